//! Losses against those that others compute: tests/data/tasks.json, made by scripts/goldens/tasks.py.

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use crate::error::Result;

/// Compares a loss and its gradients in f64; `loss` gets the inputs in the script's order.
pub(super) fn check(name: &str, loss: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let all: Value = serde_json::from_str(include_str!("../../tests/data/tasks.json")).unwrap();
    let case = &all[name];
    let tensors = |key: &str| case[key].as_array().unwrap().iter().map(tensor).collect::<Vec<_>>();
    let vars: Vec<Var> = tensors("inputs").iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let found = loss(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>()).unwrap();
    let (ours, theirs) = (found.to_scalar::<f64>().unwrap(), case["loss"].as_f64().unwrap());
    assert!((ours - theirs).abs() < 1e-9 * theirs.abs().max(1.0), "{name}: {ours} {theirs}");
    let grads = found.backward().unwrap();
    for (i, (var, theirs)) in vars.iter().zip(tensors("grads")).enumerate() {
        let ours = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name}: input {i} gets no gradient"));
        let apart = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(apart < 1e-8, "{name}: gradient of input {i} is {apart} apart");
    }
}

/// A number, a list, or a list of lists.
fn tensor(value: &Value) -> Tensor {
    fn flat(value: &Value, shape: &mut Vec<usize>, depth: usize, out: &mut Vec<f64>) {
        match value {
            Value::Array(items) => {
                if shape.len() == depth {
                    shape.push(items.len());
                }
                items.iter().for_each(|item| flat(item, shape, depth + 1, out));
            }
            number => out.push(number.as_f64().unwrap()),
        }
    }
    let (mut shape, mut values) = (Vec::new(), Vec::new());
    flat(value, &mut shape, 0, &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}
