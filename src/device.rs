//! Which device computes.

use candle_core::Device;

use crate::error::{Error, Result};

/// Understands `auto`, `cpu`, `cuda`, `cuda:N` and `metal`.
///
/// # Errors
/// When the device does not exist or this build has no support for it.
pub fn select(spec: &str) -> Result<Device> {
    let number = |n: &str| n.parse::<usize>().map_err(|_| unknown(spec));
    match spec.split_once(':') {
        None if spec == "auto" => Ok(auto()),
        None if spec == "cpu" => Ok(Device::Cpu),
        None if spec == "cuda" => cuda(0),
        None if spec == "metal" => metal(),
        Some(("cuda", n)) => cuda(number(n)?),
        _ => Err(unknown(spec)),
    }
}

/// `cpu`, `cuda:0`, `metal`, for reports.
#[must_use]
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn unknown(spec: &str) -> Error {
    Error::input("--device", format!("expected auto, cpu, cuda, cuda:N or metal, found `{spec}`"))
}

fn auto() -> Device {
    if candle_core::utils::cuda_is_available()
        && let Ok(device) = Device::new_cuda(0)
    {
        return device;
    }
    if candle_core::utils::metal_is_available()
        && let Ok(device) = Device::new_metal(0)
    {
        return device;
    }
    Device::Cpu
}

fn cuda(index: usize) -> Result<Device> {
    if !candle_core::utils::cuda_is_available() {
        return Err(Error::input("--device", "this build has no CUDA support").hint("build with `--features cuda`, or use --device cpu"));
    }
    Device::new_cuda(index).map_err(|e| unusable(format_args!("cuda:{index}"), &e))
}

fn metal() -> Result<Device> {
    if !candle_core::utils::metal_is_available() {
        return Err(Error::input("--device", "this build has no Metal support").hint("build with `--features metal`, or use --device cpu"));
    }
    Device::new_metal(0).map_err(|e| unusable("metal", &e))
}

/// The library's words without its backtrace.
fn unusable(place: impl std::fmt::Display, error: &candle_core::Error) -> Error {
    let error = error.to_string();
    Error::fault(place, format!("cannot be used: {}", error.lines().next().unwrap_or_default()))
        .hint("`peft doctor` says which devices answer; check the driver and CUDA_VISIBLE_DEVICES, or use --device cpu")
}
