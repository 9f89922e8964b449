//! Where a base comes from.
