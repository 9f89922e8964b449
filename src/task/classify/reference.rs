//! Losses against torch and the authors of the asymmetric loss, and what the options mean.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};

use super::loss::Criterion;
use super::weights::{balanced, named};
use super::{AsymmetricConfig, ClassifyConfig, Definition, Loss};
use crate::task::goldens::check;

const SINGLE: [u32; 7] = [2, 0, 4, 2, 1, 2, 3];
const WEIGHTS: [f64; 5] = [0.5, 2.0, 1.25, 3.0, 0.75];
const SEVERAL: [&[u32]; 7] = [&[1, 3, 4], &[], &[0, 1, 2, 3, 4], &[2], &[0, 4], &[3], &[1]];

fn single() -> Vec<&'static [u32]> {
    SINGLE.iter().map(std::slice::from_ref).collect()
}

fn weighted(loss: Loss) -> Criterion {
    Criterion { loss, weights: Some(WEIGHTS.map(|w| (w, 1.0)).to_vec()) }
}

#[test]
fn weighted_cross_entropy_is_torchs() {
    for (name, smoothing) in [("cross_entropy", 0.0), ("cross_entropy_smooth", 0.1)] {
        check(name, |z| weighted(Loss::CrossEntropy {}).of(&z[0], &single(), smoothing));
    }
    // Weights of 1 change nothing.
    let z = Tensor::new(&[[1f32, 2.0, 3.0, 0.0, -1.0]], &Device::Cpu).unwrap();
    let ones = Criterion { loss: Loss::CrossEntropy {}, weights: Some(vec![(1.0, 1.0); 5]) };
    let none = Criterion { loss: Loss::CrossEntropy {}, weights: None };
    let [a, b] = [ones, none].map(|c| c.of(&z, &[&[2]], 0.1).unwrap().to_scalar::<f32>().unwrap());
    assert!((a - b).abs() < 1e-6, "{a} {b}");
}

#[test]
fn binary_cross_entropy_is_torchs() {
    check("bce", |z| weighted(Loss::Bce {}).of(&z[0], &SEVERAL, 0.0));
}

#[test]
fn the_asymmetric_loss_is_its_authors() {
    let criterion =
        |gamma_pos, gamma_neg, clip| Criterion { loss: Loss::Asymmetric(AsymmetricConfig { gamma_pos, gamma_neg, clip }), weights: None };
    check("asymmetric", |z| criterion(1.0, 4.0, 0.05).of(&z[0], &SEVERAL, 0.0));
    check("asymmetric_plain", |z| criterion(0.0, 2.0, 0.0).of(&z[0], &SEVERAL, 0.0));
    // Without focusing and clip it is binary cross-entropy, and no slope is infinite where a logit is extreme.
    let z = candle_core::Var::new(&[[-90f32, 90.0, 0.3], [90.0, -90.0, 0.0]], &Device::Cpu).unwrap();
    let plain = Criterion { loss: Loss::Bce {}, weights: None };
    let labels: [&[u32]; 2] = [&[0], &[0, 2]];
    let [a, b] = [criterion(0.0, 0.0, 0.0), plain].map(|c| c.of(&z, &labels, 0.0).unwrap().to_scalar::<f32>().unwrap());
    assert!((a - b).abs() < 1e-5, "{a} {b}");
    for criterion in [criterion(0.5, 0.5, 0.0), criterion(1.0, 4.0, 0.05)] {
        let grads = criterion.of(&z, &labels, 0.0).unwrap().backward().unwrap();
        let slopes = grads.get(&z).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(slopes.iter().all(|g| g.is_finite()), "{slopes:?}");
    }
}

/// scikit-learn 1.9: `compute_class_weight("balanced", classes=[0, 1, 3], y=[0, 0, 0, 1, 3, 3, 0])`; of several labels the same of
/// each column, `classes=[1, 0]`.
#[test]
fn balanced_weights_are_scikit_learns() {
    let found = balanced(&[4, 1, 0, 2], 7, false);
    for (c, expected) in [(0, 0.583_333_333_333_333_4), (1, 2.333_333_333_333_333_5), (3, 1.166_666_666_666_666_7)] {
        assert!((found[c].0 - expected).abs() < 1e-12, "{c} {found:?}");
    }
    assert_eq!(balanced(&[4, 1, 0], 5, true), [(0.625, 2.5), (2.5, 0.625), (1.0, 1.0)]);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let parse = |text: &str| serde_json::from_str::<ClassifyConfig>(text).map_err(|e| e.to_string());
    for (text, part) in [
        (r#"{"loss": "bce"}"#, "labels: multi"),
        (r#"{"labels": "multi", "loss": "cross_entropy"}"#, "one label"),
        (r#"{"labels": "multi", "loss": {"asymmetric": {"clip": 0.7}}}"#, "0 to 0.5, found 0.7"),
        (r#"{"inputs": "both", "head_init": "text"}"#, "on images alone"),
        (r#"{"templates": []}"#, "at least one template"),
    ] {
        let found = parse(text).unwrap().validate("recipe").unwrap_err().to_string();
        assert!(found.contains(part), "{text}: {found}");
    }
    for (text, part) in [
        (r#"{"class_weights": "equal"}"#, "expected `none` or `balanced`"),
        (r#"{"class_weights": [1, -1]}"#, "above 0, found -1"),
        (r#"{"class_weights": 3}"#, "a list of numbers"),
        (r#"{"class_weights": {"cat": 0}}"#, "above 0, found 0"),
    ] {
        let found = parse(text).unwrap_err();
        assert!(found.contains(part), "{text}: {found}");
    }
    for text in [
        r#"{"inputs": "text", "templates": []}"#,
        r#"{"labels": "multi", "loss": "asymmetric", "class_weights": [1, 2.5]}"#,
        r#"{"class_weights": {"cat": 2.0, "7": 0.5}}"#,
    ] {
        let config = parse(text).unwrap();
        config.validate("recipe").unwrap();
        assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
    }
}

#[test]
fn weights_by_name_go_where_the_class_stands() {
    let by_name = [("cat".to_string(), 2.0), ("cow".to_string(), 0.5)].into_iter().collect();
    let names = |all: &[&str]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(named(&by_name, &names(&["ant", "cat", "cow"])).unwrap(), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0)]);
    assert_eq!(named(&by_name, &names(&["cow", "cat"])).unwrap(), [(0.5, 1.0), (2.0, 1.0)]);
    assert!(named(&by_name, &names(&["cat", "cows"])).unwrap_err().to_string().contains("`cow`"));
    assert!(named(&by_name, &names(&["cat", "cow", "cat"])).is_err());
}
