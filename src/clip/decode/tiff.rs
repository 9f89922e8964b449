//! Palette TIFFs, which the `image` crate does not read.

use super::{DecodeOptions, Decoded};
use crate::error::Result;

/// The image, if it is one with a palette.
pub(super) fn palette(_place: &str, _bytes: &[u8], _options: &DecodeOptions) -> Result<Option<Decoded>> {
    Ok(None)
}
