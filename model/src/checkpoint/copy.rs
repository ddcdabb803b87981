//! Copying tensors byte for byte, with their digests.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use sha2::{Digest, Sha256};

use super::{Checkpoint, CheckpointWriter};
use crate::{Error, TensorInfo, tensor::check_finite_bytes};

/// Bytes read, hashed and written at once, so few that they stay in the cache of a core; a whole
/// number of elements of every type.
const CHUNK: usize = 256 << 10;

/// Tensors in flight: one a core while one hashes and another waits for the disk.
const IN_FLIGHT: usize = 2;

impl CheckpointWriter {
    /// Copies a tensor of `source` under its own name, byte for byte; returns the SHA-256 of the
    /// bytes, in hexadecimal.
    ///
    /// Refuses F32, F16 and BF16 tensors with NaN or infinity; other types are not looked into.
    pub fn copy_from(&self, source: &Checkpoint, name: &str) -> Result<String, Error> {
        let info = source.info(name)?;
        let subject = source.subject(name);
        let mut digest = Sha256::new();
        let mut elements = 0;
        self.write_stream(name, |sink| {
            source.for_each_chunk(name, CHUNK, |chunk| {
                digest.update(chunk);
                check_finite_bytes(&subject, info, elements, chunk)?;
                elements += chunk.len() / info.dtype.size();
                sink.put(chunk)
            })
        })?;
        Ok(format!("{:x}", digest.finalize()))
    }
}

/// Copies the tensors of `source` that `wanted` names into `writer`, as
/// [`CheckpointWriter::copy_from`] does; returns the digests of all the source's tensors by name,
/// copied or not.
///
/// Two tensors are in flight at a time, the largest first; memory is a few megabytes. `done` hears
/// of each and says whether to go on. Nothing in the output depends on the order. After a failure
/// no tensor is begun.
pub fn copy_tensors(
    source: &Checkpoint,
    writer: &CheckpointWriter,
    wanted: impl Fn(&str) -> bool + Sync,
    done: impl Fn(&TensorInfo) -> bool + Sync,
) -> Result<BTreeMap<String, String>, Error> {
    let mut queue = Vec::with_capacity(source.tensors().len());
    for info in source.tensors() {
        queue.push((info.byte_len()?, info));
    }
    // Small ones last, so that no core is left alone with a large one.
    queue.sort_by_key(|&(bytes, _)| std::cmp::Reverse(bytes));
    let next = AtomicUsize::new(0);
    let outcome = Mutex::new(Ok(BTreeMap::new()));
    let work = || {
        while let Some(&(_, info)) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = &info.name;
            let digest = if wanted(name) {
                writer.copy_from(source, name)
            } else {
                source.sha256(name)
            };
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            match (digest, &mut *outcome) {
                (Ok(digest), Ok(digests)) => {
                    digests.insert(name.clone(), digest);
                }
                (Err(error), Ok(_)) => *outcome = Err(error),
                (_, Err(_)) => {}
            }
            if outcome.is_err() {
                next.store(queue.len(), Ordering::Relaxed);
                return;
            }
            drop(outcome);
            if !done(info) {
                next.store(queue.len(), Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..IN_FLIGHT {
            scope.spawn(work);
        }
        work();
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}
