//! A base model with all that belongs to it.
