//! How much memory this process may still take: of the machine, of its control groups and of its address space.

use std::path::{Path, PathBuf};

/// A bound on memory and who sets it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Available {
    /// What is left, in bytes; what the process itself has taken already counts as left.
    pub bytes: u64,
    /// `machine`, `cgroup <path>`, `address space (ulimit -v)`.
    pub bound: String,
}

/// The narrowest bound, where the system tells (Linux does).
#[must_use]
pub fn available() -> Option<Available> {
    found(Path::new("/"))
}

/// Of `wanted` threads those that a bounded address space has room for: the quickstart runs in 512 MiB of it with two threads, not
/// with four, since the allocator keeps reserves for each.
#[must_use]
pub fn threads(wanted: usize) -> usize {
    threads_within(address_space(Path::new("/")).map(|a| a.bytes), wanted)
}

fn threads_within(space: Option<u64>, wanted: usize) -> usize {
    const ALWAYS: u64 = 256 << 20;
    const EACH: u64 = 128 << 20;
    let room = space.map_or(u64::MAX, |bytes| bytes.saturating_sub(ALWAYS) / EACH);
    wanted.min(usize::try_from(room).unwrap_or(usize::MAX)).max(1)
}

/// [`available`] with the system's files under `root`.
fn found(root: &Path) -> Option<Available> {
    let own = own(root);
    let bounds = [machine(root), address_space(root)].into_iter().flatten().chain(cgroups(root));
    let narrowest = bounds.min_by_key(|b| b.bytes)?;
    // An address space counts what was taken by itself.
    let own = if narrowest.bound.starts_with("address") { 0 } else { own };
    Some(Available { bytes: narrowest.bytes + own, ..narrowest })
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The bytes of a line such as `MemAvailable:  1024 kB`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse::<u64>().ok().map(|k| k << 10)
}

/// What this process has in memory now.
fn own(root: &Path) -> u64 {
    text(&root.join("proc/self/status")).and_then(|t| kib(&t, "RssAnon")).unwrap_or(0)
}

fn machine(root: &Path) -> Option<Available> {
    let bytes = kib(&text(&root.join("proc/meminfo"))?, "MemAvailable")?;
    Some(Available { bytes, bound: "machine".into() })
}

/// The whole of it: estimates are of all that a process takes.
fn address_space(root: &Path) -> Option<Available> {
    let limits = text(&root.join("proc/self/limits"))?;
    let rest = limits.lines().find_map(|l| l.strip_prefix("Max address space"))?;
    let bytes = rest.split_whitespace().next()?.parse().ok()?;
    Some(Available { bytes, bound: "address space (ulimit -v)".into() })
}

/// What the process's groups and the groups around them leave, version 2 and 1. Pages of files that were read are given back.
fn cgroups(root: &Path) -> Vec<Available> {
    let lines = text(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mut all = Vec::new();
    for line in lines.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (mount, [limit, usage, cache]) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"]),
            c if c.split(',').any(|c| c == "memory") => {
                ("sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"])
            }
            _ => continue,
        };
        let mut inner = Some(PathBuf::from(path.trim_start_matches('/')));
        // A container may see its own group as the root of the mount.
        while let Some(group) = inner {
            let dir = root.join(mount).join(&group);
            all.extend(left(&dir, [limit, usage, cache]).map(|bytes| Available { bytes, bound: format!("cgroup /{}", group.display()) }));
            inner = group.parent().map(Path::to_path_buf);
        }
    }
    all
}

fn left(dir: &Path, [limit, usage, cache]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| text(&dir.join(name))?.trim().parse::<u64>().ok();
    let (limit, used) = (number(limit)?, number(usage)?);
    let stat = text(&dir.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|l| l.strip_prefix(cache)?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let always = [("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"), ("proc/self/status", "RssAnon:\t  1000 kB\n")];
        for (name, text) in always.iter().chain(files) {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn narrowest(files: &[(&str, &str)]) -> (u64, String) {
        let found = found(system(files).path()).unwrap();
        (found.bytes >> 10, found.bound)
    }

    #[test]
    fn a_small_address_space_has_fewer_threads() {
        let of = |mib: u64| threads_within(Some(mib << 20), 16);
        assert_eq!((of(100), of(512), of(1024), of(1 << 20), threads_within(None, 16)), (1, 2, 6, 16, 16));
    }

    #[test]
    fn the_narrowest_bound_counts() {
        assert_eq!(narrowest(&[]), (9000, "machine".into()));
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space         2097152     unlimited     bytes\n";
        assert_eq!(narrowest(&[("proc/self/limits", limits)]), (2048, "address space (ulimit -v)".into()));
        let unlimited = limits.replace("2097152", "unlimited");
        assert_eq!(narrowest(&[("proc/self/limits", &unlimited)]).1, "machine");
    }

    /// 4000 of 5000 KiB are used, 500 of them by files that can be read again; the process itself has 1000.
    #[test]
    fn groups_of_both_versions_are_read_from_the_inside_out() {
        let two = [
            ("proc/self/cgroup", "0::/slice/job\n"),
            ("sys/fs/cgroup/slice/job/memory.max", "max\n"),
            ("sys/fs/cgroup/slice/job/memory.current", "1\n"),
            ("sys/fs/cgroup/slice/memory.max", "5120000\n"),
            ("sys/fs/cgroup/slice/memory.current", "4096000\n"),
            ("sys/fs/cgroup/slice/memory.stat", "anon 1\ninactive_file 512000\n"),
        ];
        assert_eq!(narrowest(&two), (2500, "cgroup /slice".into()));
        let one = [
            ("proc/self/cgroup", "5:cpu,memory:/docker/x\n1:name=systemd:/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "5120000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "4096000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 512000\n"),
        ];
        assert_eq!(narrowest(&one), (2500, "cgroup /".into()));
    }
}
