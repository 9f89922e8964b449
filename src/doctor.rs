//! `peft doctor`: what the machine has, and what of it would be used.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Serialize;
use sysinfo::{Disks, System};

use crate::device;
use crate::files;

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnosis {
    /// Version of this program.
    pub version: &'static str,
    /// Cores and what they can do.
    pub cpu: Cpu,
    /// Graphics processors.
    pub gpu: Gpu,
    /// Main memory in bytes.
    pub memory: Memory,
    /// Bytes free on the disk of the working directory.
    pub disk_free: Option<u64>,
    /// What earlier runs and downloads left.
    pub caches: Vec<Cache>,
    /// Variables that change what happens, with their values; secrets only say that they are set.
    pub environment: Vec<(&'static str, String)>,
    /// What a run would use.
    pub uses: Uses,
    /// What could be better, and how.
    pub advice: Vec<String>,
}

/// The processor.
#[derive(Debug, Clone, Serialize)]
pub struct Cpu {
    /// Its name.
    pub model: String,
    /// Cores that this process may use: affinity and quotas count.
    pub available: usize,
    /// Cores of the machine.
    pub physical: Option<usize>,
    /// Of `avx2`, `fma`, `avx512f`, `neon`.
    pub simd: Vec<&'static str>,
}

/// Graphics processors.
#[derive(Debug, Clone, Serialize)]
pub struct Gpu {
    /// What this build supports: of `cuda`, `metal`.
    pub compiled_in: Vec<&'static str>,
    /// Devices that can be computed on.
    pub usable: Vec<String>,
    /// Devices that the driver knows.
    pub present: Vec<String>,
}

/// Main memory in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    /// Of the machine.
    pub total: u64,
    /// Not in use.
    pub available: u64,
    /// What the control group allows this process, where that is less.
    pub limit: Option<u64>,
}

/// A directory of things that can be made or fetched again.
#[derive(Debug, Clone, Serialize)]
pub struct Cache {
    /// `hub` or `activations`.
    pub what: &'static str,
    /// Where.
    pub path: PathBuf,
    /// Bytes in it; nothing where it does not exist.
    pub bytes: Option<u64>,
    /// What is in it, with bytes.
    pub entries: Vec<(String, u64)>,
}

/// What a run would use.
#[derive(Debug, Clone, Serialize)]
pub struct Uses {
    /// `cpu`, `cuda:0`, `metal:0`.
    pub device: String,
    /// Threads of the pool.
    pub threads: usize,
}

/// Looks at the machine; `device` and the current thread pool are what a run would use.
#[must_use]
pub fn diagnose(device: &Device) -> Diagnosis {
    let system = System::new_all();
    let mut found = Diagnosis {
        version: env!("CARGO_PKG_VERSION"),
        cpu: cpu(&system),
        gpu: gpu(),
        memory: memory(&system),
        disk_free: disk_free(),
        caches: vec![hub(), activations()],
        environment: environment(),
        uses: Uses { device: device::name(device), threads: rayon::current_num_threads() },
        advice: Vec::new(),
    };
    found.advice = advice(&found);
    found
}

fn cpu(system: &System) -> Cpu {
    Cpu {
        model: system.cpus().first().map(|c| c.brand().trim().to_string()).unwrap_or_default(),
        available: std::thread::available_parallelism().map_or(1, Into::into),
        physical: System::physical_core_count(),
        simd: simd(),
    }
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<&'static str> {
    let known = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ];
    known.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(target_arch = "aarch64")]
fn simd() -> Vec<&'static str> {
    vec!["neon"]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd() -> Vec<&'static str> {
    Vec::new()
}

fn gpu() -> Gpu {
    let compiled_in = [("cuda", candle_core::utils::cuda_is_available()), ("metal", candle_core::utils::metal_is_available())];
    let mut usable = Vec::new();
    if compiled_in[0].1 {
        usable.extend((0..).map_while(|i| Device::new_cuda(i).ok()).map(|d| device::name(&d)));
    }
    if compiled_in[1].1 {
        usable.extend(Device::new_metal(0).ok().map(|d| device::name(&d)));
    }
    Gpu { compiled_in: compiled_in.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect(), usable, present: nvidia() }
}

/// What NVIDIA's driver for Linux says, whether or not this build can use it.
fn nvidia() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc/driver/nvidia/gpus") else { return Vec::new() };
    let model = |path: PathBuf| {
        let text = std::fs::read_to_string(path.join("information")).ok()?;
        text.lines().find_map(|l| l.strip_prefix("Model:")).map(|m| m.trim().to_string())
    };
    let mut found: Vec<String> = entries.flatten().filter_map(|e| model(e.path())).collect();
    found.sort();
    found
}

fn memory(system: &System) -> Memory {
    let total = system.total_memory();
    let limit = system.cgroup_limits().map(|l| l.total_memory).filter(|l| *l > 0 && *l < total);
    Memory { total, available: system.available_memory(), limit }
}

/// The disk whose mount point is the longest that leads here.
fn disk_free() -> Option<u64> {
    let here = std::env::current_dir().ok()?;
    let disks = Disks::new_with_refreshed_list();
    let ours = disks.list().iter().filter(|d| here.starts_with(d.mount_point()));
    ours.max_by_key(|d| d.mount_point().as_os_str().len()).map(sysinfo::Disk::available_space)
}

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// Where the hub's client keeps what it fetched: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
fn hub() -> Cache {
    let home = || std::env::home_dir().unwrap_or_default();
    let cache = || set("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    let base = || set("HF_HOME").map_or_else(|| cache().join("huggingface"), PathBuf::from);
    let path = set("HF_HUB_CACHE").map_or_else(|| base().join("hub"), PathBuf::from);
    let entries = children(&path).into_iter().filter_map(|(name, bytes)| {
        let id = name.strip_prefix("models--")?.replace("--", "/");
        Some((id, bytes))
    });
    Cache { what: "hub", bytes: path.is_dir().then(|| files::dir_size(&path)), entries: entries.collect(), path }
}

fn activations() -> Cache {
    let path = crate::train::CacheConfig::default().directory;
    Cache { what: "activations", bytes: path.is_dir().then(|| files::dir_size(&path)), entries: children(&path), path }
}

fn children(dir: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let size = |p: &Path| if p.is_dir() { files::dir_size(p) } else { p.metadata().map_or(0, |m| m.len()) };
    let mut all: Vec<_> = entries.flatten().map(|e| (e.file_name().to_string_lossy().into_owned(), size(&e.path()))).collect();
    all.sort();
    all
}

fn environment() -> Vec<(&'static str, String)> {
    let plain = ["HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "NO_COLOR"];
    let mut all: Vec<_> = plain.into_iter().filter_map(|name| set(name).map(|value| (name, value))).collect();
    all.extend(set("HF_TOKEN").map(|_| ("HF_TOKEN", "set".to_string())));
    all
}

fn advice(found: &Diagnosis) -> Vec<String> {
    let mut all = Vec::new();
    let cuda = found.gpu.compiled_in.contains(&"cuda");
    match (found.gpu.present.is_empty(), cuda, found.gpu.usable.is_empty()) {
        (false, false, _) => all.push("there is an NVIDIA GPU, but this build cannot use it: build with `--features cuda`".into()),
        (_, true, true) => all.push("this build has CUDA, but no device answers: check the driver and CUDA_VISIBLE_DEVICES".into()),
        _ => {}
    }
    if cfg!(target_arch = "x86_64") && !found.cpu.simd.contains(&"avx2") {
        all.push("without AVX2 steps are several times slower".into());
    }
    if found.uses.threads > found.cpu.available {
        all.push(format!("{} threads on {} cores wait for one another: leave --threads out", found.uses.threads, found.cpu.available));
    }
    let room = found.memory.limit.unwrap_or(found.memory.total).min(found.memory.available);
    if room < 2 << 30 {
        all.push("less than 2 GiB of memory are free: LoRA on ViT-B/32 takes 1.5 GiB at batch 32; `train.checkpointing: true` and a smaller `train.batch` need less".into());
    }
    all
}
