//! Read-only memory maps of whole files.

use std::{fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

use crate::Error;

/// The content of a file, paged in as it is touched.
#[derive(Debug)]
pub(super) struct Map(Option<Mmap>);

impl Map {
    /// Maps a regular file; an empty file is an empty slice.
    #[expect(
        unsafe_code,
        reason = "mapping a file is the only way to open 15 GB at once"
    )]
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let metadata = file.metadata().map_err(|source| Error::io(path, source))?;
        if !metadata.is_file() {
            return Err(Error::refusal(
                path.display().to_string(),
                "a regular file",
                "something else",
                "check the path",
            ));
        }
        if metadata.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is read-only and private to this process. A file that another process
        // shortens meanwhile ends this one with SIGBUS; checkpoints are complete before they get
        // their name, so nothing of ours does that.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        Ok(Self(Some(map)))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
