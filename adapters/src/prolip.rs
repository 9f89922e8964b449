//! ProLIP: the image projection is trained and held near its start.

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::method::{Fold, Init, Method, Patch};
use crate::params::{Params, Spec, Start};
use crate::sites::{Sites, WeightId};
use crate::{Error, Result};

/// See [`ProlipConfig`].
#[derive(Debug)]
pub struct Prolip;

/// Options of ProLIP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProlipConfig {
    /// λ of λ‖W − W₀‖², from 0. Higher: nearer to the base. The authors take one over the shots where nothing is searched.
    pub lambda: f64,
}

impl Default for ProlipConfig {
    fn default() -> Self {
        Self { lambda: 0.1 }
    }
}

/// The trained module.
const MODULE: &str = "visual_projection";

struct ProlipPatch {
    id: WeightId,
    /// W and −W₀, [P, D]; a tensor of its own, since autograd would hand the base's a gradient.
    weight: Tensor,
    minus_start: Tensor,
    lambda: f64,
}

impl Method for Prolip {
    const NAME: &'static str = "prolip";
    const SOURCE: &'static str = "Fahes et al. 2024 (arXiv 2410.05270), eq. 4: L + λ‖W − W₀‖²";
    const INIT: Init = Init::Identity;
    type Config = ProlipConfig;

    fn examples() -> Vec<ProlipConfig> {
        vec![ProlipConfig { lambda: 0.5 }, ProlipConfig { lambda: 0.0 }]
    }

    fn plan(config: &ProlipConfig, sites: &Sites, params: &mut Params) -> Result<Box<dyn Patch>> {
        if !(config.lambda >= 0.0 && config.lambda.is_finite()) {
            return Err(Error::config("lambda", format!("expected a number from 0, found {}", config.lambda)));
        }
        let name = format!("{MODULE}.weight");
        let (id, base) = sites.weight(&name).ok_or_else(|| Error::config("method", format!("the model has no `{name}`")))?;
        let mut spec = Spec::new(format!("base_model.model.{name}"), base.tensor.shape(), Start::Value(base.tensor.clone()));
        // Decay would pull towards zero what λ pulls towards W₀.
        spec.decay = Some(false);
        let weight = params.declare(spec)?;
        let minus_start = (base.tensor.to_dtype(weight.dtype())? * -1.0)?;
        Ok(Box::new(ProlipPatch { id, weight, minus_start, lambda: config.lambda }))
    }

    fn to_adapter_config(config: &ProlipConfig, _sites: &Sites) -> Result<Value> {
        Ok(json!({ "peft_type": "PROLIP", "base_model_name_or_path": null, "config": config }))
    }

    fn from_adapter_config(value: &Value) -> Result<ProlipConfig> {
        serde_json::from_value(value["config"].clone()).map_err(|e| Error::config("config", crate::wording::plain(&e.to_string())))
    }
}

impl Patch for ProlipPatch {
    fn weight(&self, id: WeightId, value: Tensor) -> TensorResult<Tensor> {
        if id == self.id { self.weight.to_dtype(value.dtype()) } else { Ok(value) }
    }

    fn regulariser(&self) -> TensorResult<Option<Tensor>> {
        if self.lambda == 0.0 {
            return Ok(None);
        }
        Ok(Some(((&self.weight + &self.minus_start)?.sqr()?.sum_all()? * self.lambda)?))
    }

    fn fold(&self, _id: WeightId, _value: &Tensor) -> TensorResult<Fold> {
        // `weight` says it all.
        Ok(Fold::Unchanged)
    }
}
