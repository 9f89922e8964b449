//! IA³: learnt factors for keys, values and the MLP's hidden units.

use std::collections::HashMap;

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::flow::LinearOut;
use crate::method::{Fold, Init, Inverse, Method, Patch};
use crate::ops;
use crate::params::{Params, Spec, Start};
use crate::saved::{Bias, Saved};
use crate::scope::{self, Scope};
use crate::sites::{SiteId, SiteKind, Sites, WeightId};
use crate::targets::{Layers, Targets, Towers};
use crate::{Error, Result, hf};

/// See [`Ia3Config`].
#[derive(Debug)]
pub struct Ia3;

/// Options of IA³.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ia3Config {
    /// Linear layers whose outputs (or inputs, see `feedforward`) are scaled: names or a regex over the whole path. More
    /// targets: more capacity; a factor costs one number a unit.
    pub targets: Targets,
    /// Those among the targets whose *inputs* are scaled: the layers behind an activation.
    pub feedforward: Targets,
    /// `vision`, `text` or `both`. `vision` keeps class prompts fixed.
    pub towers: Towers,
    /// Blocks: `[10, 11]`, `"6..12"` or `{ last: 2 }`; all when left out. Only late blocks: faster, less capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Modules whose own weights are trained and saved beside the factors, such as `visual_projection`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Modules to leave out of the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
}

impl Default for Ia3Config {
    fn default() -> Self {
        Self {
            targets: Targets::names(&["k_proj", "v_proj", "fc2"]),
            feedforward: Targets::names(&["fc2"]),
            towers: Towers::Both,
            layers: None,
            modules_to_save: Vec::new(),
            exclude: None,
        }
    }
}

impl Ia3Config {
    fn scope(&self) -> Scope<'_> {
        Scope {
            targets: &self.targets,
            towers: self.towers,
            layers: self.layers.as_ref(),
            exclude: self.exclude.as_ref(),
            modules_to_save: &self.modules_to_save,
        }
    }

    /// HF PEFT's rule for `feedforward_modules`: here a name matches the end of a path even inside a word.
    fn is_feedforward(&self, path: &str) -> Result<bool> {
        match &self.feedforward {
            Targets::Names(names) => Ok(names.iter().any(|n| path.ends_with(n.as_str()))),
            pattern => pattern.matcher("feedforward")?(path),
        }
    }
}

impl Method for Ia3 {
    const NAME: &'static str = "ia3";
    const SOURCE: &'static str = "Liu et al. 2022 (arXiv 2205.05638), section 3.3: l_k ∘ K, l_v ∘ V, W₂(l_ff ∘ f(W₁x))";
    const INIT: Init = Init::Identity;
    type Config = Ia3Config;

    fn examples() -> Vec<Ia3Config> {
        vec![
            Ia3Config::default(),
            Ia3Config {
                targets: Targets::Pattern(r".*\.(q_proj|out_proj|fc1|fc2)".into()),
                feedforward: Targets::Pattern(r".*\.(fc2|out_proj)".into()),
                towers: Towers::Text,
                layers: Some(Layers::List(vec![1])),
                modules_to_save: vec!["text_projection".into()],
                ..Default::default()
            },
            Ia3Config {
                targets: Targets::names(&["v_proj", "visual_projection"]),
                feedforward: Targets::Names(vec![]),
                ..Default::default()
            },
        ]
    }

    fn plan(config: &Ia3Config, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        let mut patch = Ia3Patch { scales: HashMap::new(), by_name: HashMap::new(), saved: Saved::default() };
        for (id, site) in config.scope().sites(sites, scope::linear)? {
            let SiteKind::Linear { input, output } = site.kind else { continue };
            let feedforward = config.is_feedforward(&site.path)?;
            let shape = if feedforward { (1, input) } else { (output, 1) };
            let name = format!("base_model.model.{}.ia3_l", site.path);
            // Decay would pull the factors to zero instead of one.
            let spec = Spec { decay: Some(false), ..Spec::new(name, shape, Start::Constant(1.0)) };
            let values = params.declare(spec)?.flatten_all()?;
            for part in ["weight", "bias"] {
                if let Some((weight, _)) = sites.weight(&format!("{}.{part}", site.path)) {
                    patch.by_name.insert(weight, (id, part == "bias"));
                }
            }
            patch.scales.insert(id, Scale { values, feedforward });
        }
        patch.saved = Saved::plan(&config.modules_to_save, Bias::None, &[], sites, params)?;
        Ok(Box::new(patch))
    }

    fn to_adapter_config(config: &Ia3Config, sites: &Sites) -> Result<Value> {
        let mut fields = config.scope().fields(sites, scope::linear)?;
        let chosen = config.scope().sites(sites, scope::linear)?;
        let mut second = Vec::new();
        for (_, site) in &chosen {
            if config.is_feedforward(&site.path)? {
                second.push(site.path.as_str());
            }
        }
        // HF PEFT wants a subset of the targets: names of names, or paths of paths.
        fields["feedforward_modules"] = match (&config.targets, &config.feedforward) {
            (Targets::Names(all), Targets::Names(names))
                if fields["target_modules"] == json!(all) && names.iter().all(|n| all.contains(n)) =>
            {
                json!(names)
            }
            _ if second.is_empty() => json!([]),
            _ => {
                fields["target_modules"] = chosen.iter().map(|(_, s)| s.path.as_str()).collect();
                json!(second)
            }
        };
        fields["fan_in_fan_out"] = json!(false);
        fields["init_ia3_weights"] = json!(true);
        Ok(hf::config("IA3", fields))
    }

    fn from_adapter_config(value: &Value) -> Result<Ia3Config> {
        let object = hf::object(value)?;
        hf::refuse_others(object, &[&["feedforward_modules", "init_ia3_weights"], hf::ScopeFields::KEYS].concat())?;
        let scope = hf::ScopeFields::read(object)?;
        let feedforward = hf::field(object, "feedforward_modules")?
            .ok_or_else(|| Error::config("feedforward_modules", "expected a list of names, which may be empty, or a regex"))?;
        Ok(Ia3Config {
            targets: scope.targets,
            feedforward,
            towers: scope.towers,
            layers: scope.layers,
            modules_to_save: scope.modules_to_save,
            exclude: scope.exclude,
        })
    }
}

struct Scale {
    /// [in] or [out].
    values: Tensor,
    feedforward: bool,
}

struct Ia3Patch {
    scales: HashMap<SiteId, Scale>,
    /// The site of a weight, and whether it is the bias.
    by_name: HashMap<WeightId, (SiteId, bool)>,
    saved: Saved,
}

impl Patch for Ia3Patch {
    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        self.saved.weight(id, value)
    }

    fn linear(&self, at: SiteId, y: LinearOut) -> TensorResult<LinearOut> {
        let Some(scale) = self.scales.get(&at) else { return Ok(y) };
        let values = scale.values.to_dtype(y.x().dtype())?;
        if scale.feedforward { y.scale_input(&values) } else { y.map(|y| ops::scale(&y, &values, None)) }
    }

    fn inverse(&self) -> Inverse {
        Inverse::Divide
    }

    fn fold(&self, id: WeightId, value: &Tensor) -> TensorResult<Fold> {
        let Some((scale, is_bias)) = self.by_name.get(&id).and_then(|(site, bias)| Some((self.scales.get(site)?, *bias))) else {
            return Ok(Fold::Unchanged);
        };
        let values = scale.values.detach().to_dtype(value.dtype())?;
        Ok(match (is_bias, scale.feedforward) {
            (true, true) => Fold::Unchanged,
            (true, false) => Fold::Replace((value * values)?),
            (false, true) => Fold::Replace(value.broadcast_mul(&values)?),
            (false, false) => Fold::Replace(value.broadcast_mul(&values.unsqueeze(1)?)?),
        })
    }
}
