//! How an image becomes the model's input: resize, centre crop, rescale, normalise, as
//! `preprocessor_config.json` says and as transformers' PIL-based CLIP processor does.

mod exact;
mod read;
mod resize;

use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, Result};

/// A key of ours in `preprocessor_config.json`, which transformers passes over, and the value that is not its own way.
pub(crate) const CROP_ROUNDING: &str = "crop_rounding";
pub(crate) const TORCHVISION: &str = "torchvision";

/// What becomes of transparency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Background {
    /// Alpha is dropped, as Pillow's `convert("RGB")` does.
    #[default]
    Keep,
    /// The image is composited onto white.
    White,
}

/// What an image is resized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResizeTo {
    /// The shorter edge gets this length, the longer one follows.
    ShortestEdge(usize),
    /// Both sides are given; the aspect ratio changes.
    Exact {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
}

/// Which pixel a centre crop begins at where the margin is odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// transformers: down where it cuts, up where it pads.
    #[default]
    Transformers,
    /// torchvision, and so OpenAI and open_clip: half to even where it cuts, down where it pads.
    Torchvision,
}

/// Pillow's resampling filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resample {
    /// The nearest pixel.
    Nearest,
    /// Lanczos with three lobes.
    Lanczos,
    /// Linear interpolation.
    Bilinear,
    /// Cubic convolution with a = -0.5.
    Bicubic,
    /// The mean of the pixels covered.
    Box,
    /// Hamming-windowed sinc.
    Hamming,
}

/// How images become pixels; from `preprocessor_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// Whether images are resized.
    pub do_resize: bool,
    /// To what.
    pub size: ResizeTo,
    /// With which filter.
    pub resample: Resample,
    /// Whether the centre is cut out (and smaller images are padded with black).
    pub do_center_crop: bool,
    /// The crop's height.
    pub crop_height: usize,
    /// The crop's width.
    pub crop_width: usize,
    /// Where the crop lies.
    pub crop_rounding: Rounding,
    /// Whether values are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// The factor, usually 1/255.
    pub rescale_factor: f64,
    /// Whether `mean` is subtracted and the result divided by `std`.
    pub do_normalize: bool,
    /// Per channel, red first.
    pub mean: [f32; 3],
    /// Per channel, red first.
    pub std: [f32; 3],
}

impl Default for Preprocess {
    /// transformers' defaults, those of OpenAI's models at 224 pixels.
    fn default() -> Self {
        Self {
            do_resize: true,
            size: ResizeTo::ShortestEdge(224),
            resample: Resample::Bicubic,
            do_center_crop: true,
            crop_height: 224,
            crop_width: 224,
            crop_rounding: Rounding::Transformers,
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Preprocess {
    /// The defaults for a model of another image size.
    #[must_use]
    pub fn for_size(size: usize) -> Self {
        Self { size: ResizeTo::ShortestEdge(size), crop_height: size, crop_width: size, ..Self::default() }
    }

    /// Reads `preprocessor_config.json` with old (`"size": 224`) or new (`"size":
    /// {"shortest_edge": 224}`) keys; what is missing has transformers' defaults.
    ///
    /// # Errors
    /// When it is no JSON object or a value is not understood; the message names the key.
    pub fn from_json(place: &str, bytes: &[u8]) -> Result<Self> {
        read::from_json(place, bytes)
    }

    /// `preprocessor_config.json` as transformers writes it.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let size = match self.size {
            ResizeTo::ShortestEdge(edge) => json!({ "shortest_edge": edge }),
            ResizeTo::Exact { height, width } => json!({ "height": height, "width": width }),
        };
        // The shortest decimals of f32, not the digits of the next f64.
        let decimals = |values: [f32; 3]| values.map(|v| v.to_string().parse::<f64>().unwrap_or(f64::from(v)));
        let mut value = json!({
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": true,
            "do_resize": self.do_resize, "size": size, "resample": self.resample.code(),
            "do_center_crop": self.do_center_crop, "crop_size": { "height": self.crop_height, "width": self.crop_width },
            "do_rescale": self.do_rescale, "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize, "image_mean": decimals(self.mean), "image_std": decimals(self.std),
        });
        if self.crop_rounding == Rounding::Torchvision {
            value[CROP_ROUNDING] = TORCHVISION.into();
        }
        value
    }

    /// Whether every image comes out as `image_size` × `image_size`.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self, place: &str, image_size: usize) -> Result<()> {
        let fixed = self.do_center_crop || (self.do_resize && matches!(self.size, ResizeTo::Exact { .. }));
        if !fixed {
            return Err(Error::input(place, "without `do_center_crop`, images of different shapes come out in different sizes")
                .hint("set `do_center_crop` to true, or `size` to {\"height\": …, \"width\": …}"));
        }
        let (height, width) = self.output_size();
        if (height, width) == (image_size, image_size) {
            return Ok(());
        }
        let key = if self.do_center_crop { "crop_size" } else { "size" };
        Err(Error::input(place, format!("`{key}`: gives {height}×{width} pixels, but the model's `image_size` is {image_size}")))
    }

    /// Resize and centre crop only, in 8-bit RGB.
    ///
    /// # Errors
    /// When the image has no pixels, or is so thin that the result would not fit in memory.
    pub fn resize_crop(&self, image: &RgbImage) -> Result<RgbImage> {
        resize::resize_crop(self, image)
    }

    /// Rescale and normalise into `out`, channel by channel (3 × height × width).
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn normalise(&self, image: &RgbImage, out: &mut [f32]) {
        let pixels = image.width() as usize * image.height() as usize;
        assert_eq!(out.len(), 3 * pixels, "the output does not have 3 × height × width values");
        let values: [[f32; 256]; 3] = std::array::from_fn(|channel| self.values(channel));
        let (red, rest) = out.split_at_mut(pixels);
        let (green, blue) = rest.split_at_mut(pixels);
        for (((red, green), blue), pixel) in red.iter_mut().zip(green).zip(blue).zip(image.as_raw().as_chunks::<3>().0) {
            for ((target, values), v) in [red, green, blue].into_iter().zip(&values).zip(pixel) {
                *target = values[usize::from(*v)];
            }
        }
    }

    /// Everything: 3 × height × width values, channel by channel.
    ///
    /// # Errors
    /// As [`Self::resize_crop`].
    pub fn apply(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let image = self.resize_crop(image)?;
        let mut out = vec![0.0; image.as_raw().len()];
        self.normalise(&image, &mut out);
        Ok(out)
    }

    /// Height and width of every result, once [`Self::check`] has passed; else those of a square
    /// image.
    #[must_use]
    pub fn output_size(&self) -> (usize, usize) {
        match (self.do_center_crop, self.size) {
            (true, _) => (self.crop_height, self.crop_width),
            (false, ResizeTo::Exact { height, width }) => (height, width),
            (false, ResizeTo::ShortestEdge(edge)) => (edge, edge),
        }
    }

    /// What changes results, as canonical JSON, for digests: parts that are switched off are left
    /// out.
    #[must_use]
    pub fn digest_bytes(&self) -> Vec<u8> {
        let size = match self.size {
            ResizeTo::ShortestEdge(edge) => json!({ "shortest_edge": edge }),
            ResizeTo::Exact { height, width } => json!({ "height": height, "width": width }),
        };
        let mut value = json!({
            "size": self.do_resize.then_some(size),
            "resample": self.do_resize.then(|| self.resample.code()),
            "crop": self.do_center_crop.then_some([self.crop_height, self.crop_width]),
            "rescale": self.do_rescale.then_some(self.rescale_factor),
            "mean": self.do_normalize.then_some(self.mean),
            "std": self.do_normalize.then_some(self.std),
        });
        // Left out where it is transformers', so that digests stay what they were.
        if self.do_center_crop && self.crop_rounding == Rounding::Torchvision {
            value[CROP_ROUNDING] = TORCHVISION.into();
        }
        value.to_string().into_bytes()
    }

    /// What each of the 256 values of a channel becomes; f64 then f32, as transformers computes.
    fn values(&self, channel: usize) -> [f32; 256] {
        std::array::from_fn(|v| {
            let mut x = v as f32;
            if self.do_rescale {
                x = (v as f64 * self.rescale_factor) as f32;
            }
            if self.do_normalize {
                x = (x - self.mean[channel]) / self.std[channel];
            }
            x
        })
    }
}

impl Resample {
    /// Pillow's number for it.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Nearest => 0,
            Self::Lanczos => 1,
            Self::Bilinear => 2,
            Self::Bicubic => 3,
            Self::Box => 4,
            Self::Hamming => 5,
        }
    }
}
