//! 16-bit BMPs: the `image` crate rounds five and six bits to eight, Pillow cuts.

use image::RgbImage;

/// The channels' highest values, if the file is of this kind: 5-5-5 or 5-6-5 bits.
pub(super) fn depths(bytes: &[u8]) -> Option<[u32; 3]> {
    let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    if word(14)? < 40 || word(26)? >> 16 != 16 {
        return None;
    }
    match (word(30)?, word(54)?, word(58)?, word(62)?) {
        (0, ..) | (3, 0x7C00, 0x3E0, 0x1F) => Some([31; 3]),
        (3, 0xF800, 0x7E0, 0x1F) => Some([31, 63, 31]),
        _ => None,
    }
}

/// Back to five or six bits and up again as Pillow does.
pub(super) fn cut(image: &mut RgbImage, depths: [u32; 3]) {
    for pixel in image.pixels_mut() {
        for (value, max) in pixel.0.iter_mut().zip(depths) {
            let low = (u32::from(*value) * max * 2 + 255) / 510;
            *value = (low * 255 / max) as u8;
        }
    }
}
