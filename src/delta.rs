//! The adapter directory.
