//! `peft doctor`.

use std::fmt::Write as _;

use clap::Args;

use super::{Context, size};
use crate::doctor::{Cache, Diagnosis, diagnose};
use crate::error::Result;

pub(super) const EXAMPLES: &str = "\
Examples:
  peft doctor
  peft doctor --json --device cuda                   whether that device would be used";

/// Arguments of `peft doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {}

pub(super) fn run(_: &DoctorArgs, context: &Context) -> Result<()> {
    let found = diagnose(&context.device);
    context.print(&found, || text(&found))
}

fn text(found: &Diagnosis) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key:<13}{value}");
    };
    let or_none = |list: &[String]| if list.is_empty() { "none".to_string() } else { list.join(", ") };
    let names = |list: &[&str]| or_none(&list.iter().map(ToString::to_string).collect::<Vec<_>>());
    let cpu = &found.cpu;
    line("version", found.version.into());
    let physical = cpu.physical.map(|n| format!(" of {n} physical")).unwrap_or_default();
    line("cpu", format!("{}, {} cores to use{physical}, {}", cpu.model, cpu.available, names(&cpu.simd)));
    line(
        "gpu",
        format!(
            "{} usable; {} present; this build supports {}",
            or_none(&found.gpu.usable),
            or_none(&found.gpu.present),
            names(&found.gpu.compiled_in)
        ),
    );
    let limit = found.memory.limit.map(|l| format!(", limited to {}", size(l))).unwrap_or_default();
    line("memory", format!("{} free of {}{limit}", size(found.memory.available), size(found.memory.total)));
    if let Some(free) = found.disk_free {
        line("disk", format!("{} free", size(free)));
    }
    for cache in &found.caches {
        line(cache.what, self::cache(cache));
        cache.entries.iter().for_each(|(name, bytes)| line("", format!("  {:>8}  {name}", size(*bytes))));
    }
    for (name, value) in &found.environment {
        line("environment", format!("{name}={value}"));
    }
    line("would use", format!("{} with {} threads", found.uses.device, found.uses.threads));
    for advice in &found.advice {
        line("advice", advice.clone());
    }
    out
}

fn cache(cache: &Cache) -> String {
    let found = cache.bytes.map_or("nothing".to_string(), size);
    format!("{} in {}", found, cache.path.display())
}
