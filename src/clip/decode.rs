//! Image decoding.
