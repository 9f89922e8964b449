//! Reading `preprocessor_config.json`.

use serde_json::{Map, Value};

use super::{CROP_ROUNDING, Preprocess, Resample, ResizeTo, Rounding, TORCHVISION};
use crate::error::{Error, Result};

/// Larger outputs are mistakes, not CLIP models.
const MAX_SIDE: u64 = 8192;

struct Keys<'a> {
    place: &'a str,
    map: &'a Map<String, Value>,
}

pub(super) fn from_json(place: &str, bytes: &[u8]) -> Result<Preprocess> {
    let value: Value = crate::json::from_slice(bytes).map_err(|e| Error::input(place, format!("not valid JSON: {e}")))?;
    let Some(map) = value.as_object() else {
        return Err(Error::input(place, "expected a JSON object"));
    };
    let keys = Keys { place, map };
    let default = Preprocess::default();
    if keys.flag("do_pad", false)? {
        return Err(Error::input(place, "`do_pad`: true is not supported; CLIP pads by `do_center_crop` alone"));
    }
    let (crop_height, crop_width) = keys.crop()?.unwrap_or((default.crop_height, default.crop_width));
    Ok(Preprocess {
        do_resize: keys.flag("do_resize", true)?,
        size: keys.resize_to()?.unwrap_or(default.size),
        resample: keys.resample()?.unwrap_or(default.resample),
        do_center_crop: keys.flag("do_center_crop", true)?,
        crop_height,
        crop_width,
        crop_rounding: keys.rounding()?,
        do_rescale: keys.flag("do_rescale", true)?,
        rescale_factor: keys.factor()?.unwrap_or(default.rescale_factor),
        do_normalize: keys.flag("do_normalize", true)?,
        mean: keys.triple("image_mean", |_| true)?.unwrap_or(default.mean),
        std: keys.triple("image_std", |x| x > 0.0)?.unwrap_or(default.std),
    })
}

impl Keys<'_> {
    /// A key's value; null counts as missing, as in transformers.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::input(self.place, format!("`{key}`: expected {expected}, found {found}"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))
    }

    fn resize_to(&self) -> Result<Option<ResizeTo>> {
        let Some(value) = self.get("size") else { return Ok(None) };
        let expected = format!("a length from 1 to {MAX_SIDE}, {{\"shortest_edge\": …}} or {{\"height\": …, \"width\": …}}");
        if let Some(edge) = side(value) {
            return Ok(Some(ResizeTo::ShortestEdge(edge)));
        }
        let found = match value.as_object().and_then(|map| map.get("shortest_edge")).filter(|v| !v.is_null()) {
            Some(_) if value.get("longest_edge").is_some_and(|v| !v.is_null()) => None,
            Some(edge) => side(edge).map(ResizeTo::ShortestEdge),
            None => pair(value).map(|(height, width)| ResizeTo::Exact { height, width }),
        };
        found.map(Some).ok_or_else(|| self.wrong("size", &expected, value))
    }

    fn crop(&self) -> Result<Option<(usize, usize)>> {
        let Some(value) = self.get("crop_size") else { return Ok(None) };
        side(value)
            .map(|n| (n, n))
            .or_else(|| pair(value))
            .map(Some)
            .ok_or_else(|| self.wrong("crop_size", &format!("a length from 1 to {MAX_SIDE} or {{\"height\": …, \"width\": …}}"), value))
    }

    fn rounding(&self) -> Result<Rounding> {
        match self.get(CROP_ROUNDING).map(|v| (v, v.as_str())) {
            None | Some((_, Some("transformers"))) => Ok(Rounding::Transformers),
            Some((_, Some(TORCHVISION))) => Ok(Rounding::Torchvision),
            Some((found, _)) => Err(self.wrong(CROP_ROUNDING, "torchvision or transformers", found)),
        }
    }

    fn resample(&self) -> Result<Option<Resample>> {
        let Some(value) = self.get("resample") else { return Ok(None) };
        let all = [
            (Resample::Nearest, "nearest"),
            (Resample::Lanczos, "lanczos"),
            (Resample::Bilinear, "bilinear"),
            (Resample::Bicubic, "bicubic"),
            (Resample::Box, "box"),
            (Resample::Hamming, "hamming"),
        ];
        // Some writers give the enum's full name, "PILImageResampling.BICUBIC".
        let name = value.as_str().and_then(|s| s.rsplit('.').next()).map(str::to_lowercase);
        let code = value.as_u64();
        all.into_iter()
            .find(|(r, n)| name.as_deref() == Some(n) || code == Some(u64::from(r.code())))
            .map(|(r, _)| Some(r))
            .ok_or_else(|| self.wrong("resample", "0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box or 5 hamming", value))
    }

    fn factor(&self) -> Result<Option<f64>> {
        let Some(value) = self.get("rescale_factor") else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(self.wrong("rescale_factor", "a number above 0", value)),
        }
    }

    /// One number per channel, or one for all of them.
    fn triple(&self, key: &str, legal: fn(f32) -> bool) -> Result<Option<[f32; 3]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && legal(*x));
        let found = match value.as_array().map(Vec::as_slice) {
            Some([r, g, b]) => number(r).zip(number(g)).zip(number(b)).map(|((r, g), b)| [r, g, b]),
            Some(_) => None,
            None => number(value).map(|x| [x; 3]),
        };
        let expected = if key == "image_std" { "three numbers above 0" } else { "three numbers" };
        found.map(Some).ok_or_else(|| self.wrong(key, expected, value))
    }
}

fn side(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| (1..=MAX_SIDE).contains(n)).map(|n| n as usize)
}

/// `{"height": h, "width": w}` or `[h, w]`.
fn pair(value: &Value) -> Option<(usize, usize)> {
    let (height, width) = match value {
        Value::Object(map) => (map.get("height")?, map.get("width")?),
        Value::Array(items) if items.len() == 2 => (&items[0], &items[1]),
        _ => return None,
    };
    side(height).zip(side(width))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Preprocess> {
        from_json("preprocessor_config.json", json.as_bytes())
    }

    #[test]
    fn old_and_new_keys_say_the_same() {
        let old = read(r#"{"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}"#);
        let new = read(
            r#"{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "resample": "bicubic",
                "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": true, "rescale_factor": 0.00392156862745098}"#,
        );
        assert_eq!(old.unwrap(), Preprocess::default());
        assert_eq!(new.unwrap().digest_bytes(), read("{}").unwrap().digest_bytes());
    }

    #[test]
    fn exact_sizes_and_nulls() {
        let p = read(r#"{"size": {"height": 30, "width": 20, "shortest_edge": null}, "do_center_crop": false, "crop_size": null}"#);
        let p = p.unwrap();
        assert_eq!(p.output_size(), (30, 20));
        assert!(p.check("x", 30).unwrap_err().to_string().contains("30×20"));
    }

    #[test]
    fn a_crop_that_the_model_does_not_take_is_refused() {
        let p = read(r#"{"crop_size": 336}"#).unwrap();
        p.check("x", 336).unwrap();
        assert!(p.check("x", 224).unwrap_err().to_string().contains("crop_size"));
        let p = read(r#"{"do_center_crop": false}"#).unwrap();
        assert!(p.check("x", 224).unwrap_err().to_string().contains("do_center_crop"));
    }

    #[test]
    fn nonsense_is_refused_with_the_key() {
        for (json, key) in [
            (r#"{"size": 0}"#, "`size`"),
            (r#"{"size": {"longest_edge": 3}}"#, "`size`"),
            (r#"{"size": {"shortest_edge": 224, "longest_edge": 448}}"#, "`size`"),
            (r#"{"size": 100000000}"#, "`size`"),
            (r#"{"crop_size": {"height": 3}}"#, "`crop_size`"),
            (r#"{"crop_size": -1}"#, "`crop_size`"),
            (r#"{"resample": 9}"#, "`resample`"),
            (r#"{"resample": "cubic"}"#, "`resample`"),
            (r#"{"do_resize": "yes"}"#, "`do_resize`"),
            (r#"{"do_pad": true}"#, "`do_pad`"),
            (r#"{"image_mean": [0.5, 0.5]}"#, "`image_mean`"),
            (r#"{"image_std": [0.5, 0, 0.5]}"#, "`image_std`"),
            (r#"{"rescale_factor": 0}"#, "`rescale_factor`"),
            ("[]", "object"),
            ("", "JSON"),
        ] {
            let message = read(json).unwrap_err().to_string();
            assert!(message.contains(key), "{json}: {message}");
        }
    }
}
