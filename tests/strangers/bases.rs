//! `config.json` and `preprocessor_config.json`: each field × each odd value.

use peft::clip::ClipConfig;
use peft::clip::preprocess::Preprocess;

use super::Expect::{Either, Fine, Refused};
use super::{Case, Expect, ODD};

fn config(name: impl Into<String>, json: String, expect: Expect) -> Case {
    Case::new(name, expect, move |_| Box::new(move || ClipConfig::from_json("config.json", json.as_bytes()).map(drop)))
}

fn preprocess(name: impl Into<String>, json: String, expect: Expect) -> Case {
    Case::new(name, expect, move |_| {
        Box::new(move || {
            let preprocess = Preprocess::from_json("preprocessor_config.json", json.as_bytes())?;
            // A short side of one pixel is where sizes explode.
            let thin = image::RgbImage::new(1, 4096);
            preprocess.check("preprocessor_config.json", preprocess.output_size().0)?;
            preprocess.resize_crop(&thin).map(drop)
        })
    })
}

pub(crate) fn cases() -> Vec<Case> {
    const SIZES: [&str; 4] = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    let mut cases = vec![config("an empty one", "{}".into(), Fine)];
    for (section, own) in [("text_config", ["vocab_size", "max_position_embeddings"]), ("vision_config", ["image_size", "patch_size"])] {
        for field in SIZES.iter().chain(&own) {
            for odd in ODD {
                cases.push(config(
                    format!("{section}.{field}: {odd}"),
                    format!("{{\"{section}\":{{\"{field}\":{odd}}}}}"),
                    Refused("config.json"),
                ));
            }
        }
        for field in ["layer_norm_eps", "hidden_act", "eos_token_id", "num_channels"] {
            for odd in ODD.iter().chain(&["1e999", "\"swish2\"", "-1e-5"]) {
                cases.push(config(format!("{section}.{field}: {odd}"), format!("{{\"{section}\":{{\"{field}\":{odd}}}}}"), Either));
            }
        }
    }
    for (name, json, part) in [
        ("not JSON", "{".to_string(), "JSON"),
        ("a list", "[]".into(), "object"),
        ("empty", String::new(), "JSON"),
        ("deep", "[".repeat(1 << 20), "JSON"),
        ("a million zeros", format!("[{}0]", "0,".repeat(2 << 20)), "values"),
        ("another model", r#"{"model_type": "bert"}"#.into(), "model_type"),
        ("SigLIP", r#"{"model_type": "siglip"}"#.into(), "SigLIP"),
        ("an image of a megapixel a side", r#"{"vision_config": {"image_size": 1048576, "patch_size": 4096}}"#.into(), "image_size"),
        (
            "a thousand layers of a million",
            r#"{"text_config": {"num_hidden_layers": 1000, "hidden_size": 1048576, "num_attention_heads": 1}}"#.into(),
            "parameters",
        ),
    ] {
        cases.push(config(name, json, Refused(part)));
    }
    for field in ["size", "crop_size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_center_crop", "image_mean", "image_std"]
    {
        for odd in
            ODD.iter().chain(&["1e999", "[0,0,0]", "[1,2]", "[1e300,1,1]", "{\"shortest_edge\":0}", "{\"height\":100000,\"width\":1}"])
        {
            cases.push(preprocess(format!("{field}: {odd}"), format!("{{\"{field}\":{odd}}}"), Either));
        }
    }
    for (name, json, part) in [
        ("not JSON", "{".to_string(), "JSON"),
        ("a list", "[]".into(), "object"),
        ("a million zeros", format!("[{}0]", "0,".repeat(2 << 20)), "values"),
        ("8192 pixels, and a thin image", r#"{"size": {"shortest_edge": 8192}, "do_center_crop": false}"#.into(), "different sizes"),
        ("padding", r#"{"do_pad": true}"#.into(), "do_pad"),
    ] {
        cases.push(preprocess(format!("preprocessor: {name}"), json, Refused(part)));
    }
    cases
}
