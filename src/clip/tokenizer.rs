//! Texts to ids.
