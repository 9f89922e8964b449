//! The files of a repository: asked for once a commit, kept beside the cache's own directories, so that a set is whole or
//! missed when nobody may be asked.

use std::path::PathBuf;

#[cfg(feature = "hub")]
use super::remote;
use super::{Progress, Repo, Snapshot, legal_file};
use crate::error::{Error, Result};
use crate::files;

/// Larger lists are not believed.
const MAX_LISTING: u64 = 64 << 20;

impl Snapshot {
    /// The names of all files at this revision.
    ///
    /// # Errors
    /// When the hub cannot be reached or refuses, and the cache does not know either.
    pub fn files(&mut self) -> Result<Vec<String>> {
        if let Some(known) = self.commit.clone().and_then(|commit| self.known(&commit)) {
            return Ok(known);
        }
        #[cfg(feature = "hub")]
        if let Some(remote) = self.remote.clone() {
            let revision = self.commit.as_deref().unwrap_or(&self.repo.revision);
            match remote.list(revision) {
                Ok((commit, names)) => {
                    self.settle(&commit);
                    files::write_json(&self.listing(&commit), &names)?;
                    return Ok(names);
                }
                Err(unreachable @ remote::Failure::Unreachable(_)) => match self.remembered() {
                    Some(names) => {
                        self.remote = None;
                        self.notes.push(format!("{}: the hub cannot be reached; files come from the cache", self.repo));
                        return Ok(names);
                    }
                    None => return Err(remote.explain(unreachable, "list of files")),
                },
                Err(failure) => return Err(remote.explain(failure, "list of files")),
            }
        }
        self.remembered().ok_or_else(|| self.lacks("list of files"))
    }

    fn listing(&self, commit: &str) -> PathBuf {
        self.cache.repo().join("listings").join(format!("{commit}.json"))
    }

    fn known(&self, commit: &str) -> Option<Vec<String>> {
        serde_json::from_slice(&files::read(&self.listing(commit), MAX_LISTING).ok()?).ok()
    }

    /// What the revision last stood for; of a snapshot that another program fetched, the files that are there.
    fn remembered(&mut self) -> Option<Vec<String>> {
        let commit = self.commit.clone().or_else(|| self.cache.commit(&self.repo.revision))?;
        let root = self.cache.snapshot(&commit);
        let names = self.known(&commit).or_else(|| {
            // A link whose content is gone is a file all the same: a set that lacks it is not whole.
            let entries = walkdir::WalkDir::new(&root).sort_by_file_name().into_iter().collect::<std::result::Result<Vec<_>, _>>().ok()?;
            let names: Vec<String> = entries
                .into_iter()
                .filter(|e| !e.path().is_dir())
                .filter_map(|e| Some(e.path().strip_prefix(&root).ok()?.to_string_lossy().replace('\\', "/")))
                .collect();
            Some(names).filter(|n| !n.is_empty())
        })?;
        self.settle(&commit);
        Some(names)
    }
}

/// The names of a dataset's files; nothing is fetched but the list.
///
/// # Errors
/// When the id is none, or the list cannot be had.
pub fn dataset_files(id: &str) -> Result<Vec<String>> {
    let mut snapshot = Snapshot::open(&dataset_id(id)?)?;
    let names = snapshot.files()?;
    snapshot.keep()?;
    Ok(names)
}

fn dataset_id(id: &str) -> Result<Repo> {
    Repo::dataset(id).ok_or_else(|| Error::input(format!("hub:{id}"), "expected hub:owner/dataset or hub:owner/dataset@revision"))
}

/// Files of a dataset, fetched if they have to be: those of `owner/name@revision` that `wanted` picks, sorted.
///
/// # Errors
/// When the id is none, nothing is picked, or a file cannot be had.
pub fn dataset(id: &str, wanted: &dyn Fn(&str) -> bool, progress: &mut Progress<'_>) -> Result<Vec<PathBuf>> {
    let repo = dataset_id(id)?;
    let mut snapshot = Snapshot::open(&repo)?;
    let mut names: Vec<String> = snapshot.files()?.into_iter().filter(|n| legal_file(n) && wanted(n)).collect();
    names.sort();
    if names.is_empty() {
        return Err(snapshot.lacks("such file").hint(
            "the hub keeps a Parquet copy of many datasets under the revision refs/convert/parquet: hub:owner/dataset@refs/convert/parquet",
        ));
    }
    check_whole(&repo, &names)?;
    let paths = names.iter().map(|name| snapshot.get(name, progress)?.ok_or_else(|| snapshot.lacks(name))).collect::<Result<_>>()?;
    snapshot.keep()?;
    Ok(paths)
}

/// Names such as `train-00000-of-00003.parquet` say how many there have to be.
fn check_whole(repo: &Repo, names: &[String]) -> Result<()> {
    for name in names {
        let Some((head, tail)) = name.split_once("-of-") else { continue };
        let digits: String = tail.chars().take_while(char::is_ascii_digit).collect();
        let stem = head.trim_end_matches(|c: char| c.is_ascii_digit());
        let Ok(count) = digits.parse::<usize>() else { continue };
        let there = names.iter().filter(|n| n.starts_with(stem) && n.contains(&format!("-of-{digits}"))).count();
        if there < count {
            return Err(Error::input(repo, format!("{there} of the {count} files {stem}… are in the cache"))
                .hint("fetch the rest with the network, or with the program that fetched these"));
        }
    }
    Ok(())
}
