//! What tells inputs apart, in the names of kept entries.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::request::file_name;

/// The first 64 bits of a SHA-256.
fn short(hash: Sha256) -> u64 {
    let hash = hash.finalize();
    hash.iter()
        .take(8)
        .fold(0, |all, &byte| all << 8 | u64::from(byte))
}

/// Of bytes.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    short(Sha256::new_with_prefix(bytes))
}

/// Of a file's bytes.
pub(super) fn digest_of(file: &Path) -> io::Result<u64> {
    let mut file = fs::File::open(file)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(short(hash)),
            n => hash.update(&piece[..n]),
        }
    }
}

/// Of a model's files by name, size and time: its bytes may be many.
pub(super) fn stamp_of(model: &Path) -> io::Result<u64> {
    let mut files = if model.is_dir() {
        fs::read_dir(model)?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<Vec<_>>>()?
    } else {
        vec![model.to_path_buf()]
    };
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let about = fs::metadata(&file)?;
        let name = file_name(&file.to_string_lossy());
        hash.update(format!("{name} {} {:?}", about.len(), about.modified()?));
    }
    Ok(short(hash))
}
