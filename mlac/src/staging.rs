//! Output folders that appear whole or not at all.
//!
//! A folder is filled beside its final name, as `<name>.partial`, and renamed when it is complete.
//! A run that was killed leaves only the `.partial` folder, which the next run removes.

use std::fs;
use std::path::{Path, PathBuf};

use mlac_model::Refusal;

use crate::error::Error;

/// A folder being filled.
#[derive(Debug)]
pub struct Staging {
    partial: PathBuf,
    target: PathBuf,
    done: bool,
}

impl Staging {
    /// Starts `<target>.partial`; refuses a target that exists.
    pub fn create(target: &Path) -> Result<Self, Error> {
        refuse_existing(target)?;
        let partial = partial_name(target)?;
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
        }
        fs::create_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
        Ok(Self {
            partial,
            target: target.to_path_buf(),
            done: false,
        })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its final name.
    pub fn finish(mut self) -> Result<(), Error> {
        fs::rename(&self.partial, &self.target).map_err(|e| Error::io(&self.target, e))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // The error that ended the run is the one to show; a leftover is removed by the next run.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Refuses an output that is there already, so that nothing is overwritten by accident.
pub fn refuse_existing(target: &Path) -> Result<(), Error> {
    if target.symlink_metadata().is_ok() {
        return Err(Refusal::new(
            format!("output {}", target.display()),
            "a path that does not exist yet",
            "something is there",
            "choose another name or remove it first",
        )
        .into());
    }
    Ok(())
}

/// `<target>.partial`, beside the target.
pub fn partial_name(target: &Path) -> Result<PathBuf, Error> {
    beside(target, ".partial")
}

/// `<target><ending>`, beside the target.
pub fn beside(target: &Path, ending: &str) -> Result<PathBuf, Error> {
    let Some(name) = target.file_name() else {
        return Err(Refusal::new(
            format!("output {}", target.display()),
            "a path that ends in a name",
            "one that does not",
            "give the folder a name, such as out/",
        )
        .into());
    };
    let mut beside = name.to_os_string();
    beside.push(ending);
    Ok(target.with_file_name(beside))
}

/// Writes a file beside its final name and renames it.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let partial = partial_name(path)?;
    fs::write(&partial, bytes).map_err(|e| Error::io(&partial, e))?;
    fs::rename(&partial, path).map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_staging_leaves_nothing_and_a_finished_one_everything() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let staging = Staging::create(&out).unwrap();
        fs::write(staging.path().join("a"), b"1").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let staging = Staging::create(&out).unwrap();
        fs::write(staging.path().join("a"), b"1").unwrap();
        staging.finish().unwrap();
        assert_eq!(fs::read(out.join("a")).unwrap(), b"1");
        assert!(
            Staging::create(&out).is_err(),
            "an existing folder must be refused"
        );
    }

    #[test]
    fn a_stale_partial_folder_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(dir.path().join("out.partial")).unwrap();
        fs::write(dir.path().join("out.partial/stale"), b"x").unwrap();
        let staging = Staging::create(&out).unwrap();
        assert!(!staging.path().join("stale").exists());
        staging.finish().unwrap();
        assert!(out.exists());
    }
}
