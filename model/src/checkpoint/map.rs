//! Read-only access to whole files: mapped, and by position.

use std::{
    fs::File,
    ops::{Deref, Range},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use memmap2::{Advice, Mmap, UncheckedAdvice};

use crate::Error;

/// The content of a file, paged in as it is touched or read by position.
///
/// Touched pages count as memory of this process until they are released; bytes read by position
/// never do.
#[derive(Debug)]
pub(super) struct Map {
    path: PathBuf,
    file: File,
    pages: Option<Mmap>,
}

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
        let pages = if metadata.len() == 0 {
            None
        } else {
            // SAFETY: the map is read-only and private to this process. A file that another process
            // shortens meanwhile ends this one with SIGBUS; checkpoints are complete before they get
            // their name, so nothing of ours does that.
            Some(unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?)
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            pages,
        })
    }

    /// Fills `buffer` with the file's bytes from `offset` on, past the map.
    pub(super) fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(buffer, offset as u64)
            .map_err(|source| Error::io(&self.path, source))
    }

    /// Asks the system to bring a range into its cache soon; reading it later waits less.
    pub(super) fn prefetch(&self, range: Range<usize>) {
        if let Some(pages) = &self.pages
            && !range.is_empty()
        {
            // Only speed depends on it.
            let _ = pages.advise_range(Advice::WillNeed, range.start, range.len());
        }
    }

    /// Takes the pages of a range out of this process's memory; touched again, they are read again.
    #[expect(
        unsafe_code,
        reason = "a model larger than memory is read through one map"
    )]
    pub(super) fn release(&self, range: Range<usize>) {
        if let Some(pages) = &self.pages
            && !range.is_empty()
        {
            // SAFETY: MADV_DONTNEED drops changes to private memory, and of a read-only map of a file
            // there are none: the same bytes come back from the file, also for those who hold slices.
            let _ = unsafe {
                pages.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.pages.as_deref().unwrap_or_default()
    }
}
