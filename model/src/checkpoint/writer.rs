//! Writing a checkpoint as safetensors shards with an index.
//!
//! Headers come first and files have their full length from the start, so tensors can be written
//! in any order and by several threads. Everything happens in `<folder>.partial`; the folder gets
//! its name when it is complete. The same tensors give the same bytes.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::json;

use crate::{Error, TensorInfo, tensor::shape_text};

/// A checkpoint in the making. Dropped before [`CheckpointWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    folder: PathBuf,
    partial: PathBuf,
    shards: Vec<Shard>,
    places: HashMap<String, Place>,
    finished: bool,
}

#[derive(Debug)]
struct Shard {
    name: String,
    file: File,
    length: u64,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    offset: u64,
    length: usize,
    /// Someone writes it or has written it.
    claimed: AtomicBool,
    /// It is there as a whole.
    written: AtomicBool,
}

/// Where [`CheckpointWriter::write_stream`] puts the pieces of a tensor.
#[derive(Debug)]
pub struct TensorSink<'a> {
    writer: &'a CheckpointWriter,
    name: &'a str,
    place: &'a Place,
    filled: usize,
}

impl TensorSink<'_> {
    /// Writes the next bytes of the tensor; refuses more than it has.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let filled = self.filled + bytes.len();
        if filled > self.place.length {
            return Err(self
                .writer
                .wrong_length(self.name, self.place.length, filled));
        }
        let shard = &self.writer.shards[self.place.shard];
        shard
            .file
            .write_all_at(bytes, self.place.offset + self.filled as u64)
            .map_err(|source| {
                let path = self.writer.partial.join(&shard.name);
                write_error(&path, shard.length, source)
            })?;
        self.filled = filled;
        Ok(())
    }
}

impl CheckpointWriter {
    /// Lays out the files of a new checkpoint.
    ///
    /// `folder` must not exist. Tensors are put into shards of at most `max_shard_bytes` of data in
    /// the order given (a larger tensor gets a shard of its own), and inside a shard by falling
    /// element size, which keeps every tensor aligned. One shard is called `model.safetensors`.
    pub fn create(
        folder: &Path,
        tensors: Vec<TensorInfo>,
        max_shard_bytes: u64,
    ) -> Result<Self, Error> {
        refuse_existing(folder)?;
        let groups = group(tensors, max_shard_bytes)?;
        let count = groups.len();
        let name = |at: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let shards = groups
            .into_iter()
            .enumerate()
            .map(|(at, group)| (name(at), group))
            .collect();
        Self::create_shards(folder, shards)
    }

    /// Lays out the files of a new checkpoint as the caller says: names of files and the tensors in
    /// each, which are brought into order of falling element size. More than one get an index.
    pub fn create_shards(
        folder: &Path,
        shards: Vec<(String, Vec<TensorInfo>)>,
    ) -> Result<Self, Error> {
        refuse_existing(folder)?;
        let partial = partial_path(folder)?;
        remove_stale(&partial)?;
        fs::create_dir_all(&partial).map_err(|source| Error::io(&partial, source))?;
        let mut writer = Self {
            folder: folder.to_owned(),
            partial,
            shards: Vec::new(),
            places: HashMap::new(),
            finished: false,
        };
        let count = shards.len();
        for (name, mut tensors) in shards {
            writer.plain_name(&name)?;
            tensors.sort_by_key(|info| std::cmp::Reverse(info.dtype.size()));
            writer.add_shard(name, &tensors)?;
        }
        if count > 1 {
            writer.write_index()?;
        }
        Ok(writer)
    }

    fn add_shard(&mut self, name: String, tensors: &[TensorInfo]) -> Result<(), Error> {
        let at = self.shards.len();
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut end = 0;
        let mut offsets = Vec::with_capacity(tensors.len());
        for info in tensors {
            let length = info.byte_len()?;
            header.insert(
                info.name.clone(),
                json!({
                    "dtype": info.dtype.safetensors_name(),
                    "shape": info.shape,
                    "data_offsets": [end, end + length],
                }),
            );
            offsets.push((end, length));
            end += length;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let base = 8 + header.len();
        let length = (base + end) as u64;

        let path = self.partial.join(&name);
        let write = || -> io::Result<File> {
            let mut file = File::create_new(&path)?;
            file.set_len(length)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            Ok(file)
        };
        let file = write().map_err(|source| write_error(&path, length, source))?;
        for (info, (offset, length)) in tensors.iter().zip(offsets) {
            let place = Place {
                shard: at,
                offset: (base + offset) as u64,
                length,
                claimed: AtomicBool::new(false),
                written: AtomicBool::new(false),
            };
            if self.places.insert(info.name.clone(), place).is_some() {
                return Err(Error::refusal(
                    format!("{}: tensor {}", self.folder.display(), info.name),
                    "each tensor once",
                    "the name twice",
                    "write every tensor under its own name",
                ));
            }
        }
        self.shards.push(Shard { name, file, length });
        Ok(())
    }

    fn write_index(&self) -> Result<(), Error> {
        let weight_map: BTreeMap<&str, &str> = self
            .places
            .iter()
            .map(|(name, place)| (name.as_str(), self.shards[place.shard].name.as_str()))
            .collect();
        let total: usize = self.places.values().map(|place| place.length).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let mut text = format!("{index:#}");
        text.push('\n');
        self.write_file("model.safetensors.index.json", text.as_bytes())
    }

    /// Writes the data of one tensor: its little-endian elements, row-major. Each tensor is written
    /// once; calls may come in any order and from several threads.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.write_stream(name, |sink| {
            // Refused before a byte is written.
            if bytes.len() < sink.place.length {
                return Err(self.wrong_length(name, sink.place.length, bytes.len()));
            }
            sink.put(bytes)
        })
    }

    /// Writes one tensor in pieces: `fill` puts them into the sink in order, all of them.
    ///
    /// A tensor whose `fill` failed counts as not written and may be written again.
    pub fn write_stream<E: From<Error>>(
        &self,
        name: &str,
        fill: impl FnOnce(&mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let subject = || format!("{}: tensor {name}", self.folder.display());
        let Some(place) = self.places.get(name) else {
            return Err(Error::refusal(
                subject(),
                "a tensor that was announced",
                "another name",
                "announce every tensor when the checkpoint is created",
            )
            .into());
        };
        if place.claimed.swap(true, Ordering::Relaxed) {
            return Err(Error::refusal(
                subject(),
                "each tensor written once",
                "a second write",
                "write every tensor once",
            )
            .into());
        }
        let mut sink = TensorSink {
            writer: self,
            name,
            place,
            filled: 0,
        };
        let filled = fill(&mut sink).and_then(|()| {
            if sink.filled == place.length {
                return Ok(());
            }
            Err(self.wrong_length(name, place.length, sink.filled).into())
        });
        let state = match filled {
            Ok(()) => &place.written,
            Err(_) => &place.claimed,
        };
        state.store(filled.is_ok(), Ordering::Relaxed);
        filled
    }

    fn wrong_length(&self, name: &str, expected: usize, found: usize) -> Error {
        Error::refusal(
            format!("{}: tensor {name}", self.folder.display()),
            format!("{expected} bytes"),
            format!("{found} bytes"),
            "write the tensor in the type and shape it was announced with",
        )
    }

    /// Writes a file beside the weights, `config.json` for example.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.partial.join(self.plain_name(name)?);
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|source| write_error(&path, bytes.len() as u64, source))
    }

    /// Copies a file beside the weights under its own name.
    pub fn copy_file(&self, source: &Path) -> Result<(), Error> {
        let name = source
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let bytes = fs::read(source).map_err(|error| Error::io(source, error))?;
        self.write_file(name, &bytes)
    }

    fn plain_name<'a>(&self, name: &'a str) -> Result<&'a str, Error> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(Error::refusal(
                format!("{}: file {name:?}", self.folder.display()),
                "a plain file name",
                "a path",
                "write files directly into the checkpoint's folder",
            ));
        }
        Ok(name)
    }

    /// Checks that every tensor was written, makes the files durable and gives the folder its name.
    pub fn finish(mut self) -> Result<(), Error> {
        let unwritten = self
            .places
            .iter()
            .filter(|(_, place)| !place.written.load(Ordering::Relaxed))
            .map(|(name, _)| name)
            .min();
        if let Some(name) = unwritten {
            return Err(Error::refusal(
                format!("{}: tensor {name}", self.folder.display()),
                "every announced tensor written",
                "one that was not",
                "write every tensor before finishing",
            ));
        }
        for shard in &self.shards {
            shard.file.sync_all().map_err(|source| {
                write_error(&self.partial.join(&shard.name), shard.length, source)
            })?;
        }
        sync_folder(&self.partial)?;
        refuse_existing(&self.folder)?;
        fs::rename(&self.partial, &self.folder)
            .map_err(|source| Error::io(&self.folder, source))?;
        self.finished = true;
        sync_folder(parent(&self.folder))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing can be reported from here, and a folder that stays is removed by the next run.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Splits tensors into shards, in order.
fn group(tensors: Vec<TensorInfo>, max_shard_bytes: u64) -> Result<Vec<Vec<TensorInfo>>, Error> {
    let mut groups = vec![Vec::new()];
    let mut filled = 0_u64;
    for info in tensors {
        if info.name == "__metadata__" || info.name.is_empty() {
            return Err(Error::refusal(
                format!("tensor {:?} {}", info.name, shape_text(&info.shape)),
                "a name that safetensors can hold",
                "a reserved or empty one",
                "give the tensor another name",
            ));
        }
        let length = info.byte_len()? as u64;
        if filled > 0 && filled.saturating_add(length) > max_shard_bytes {
            groups.push(Vec::new());
            filled = 0;
        }
        filled = filled.saturating_add(length);
        if let Some(last) = groups.last_mut() {
            last.push(info);
        }
    }
    Ok(groups)
}

fn refuse_existing(folder: &Path) -> Result<(), Error> {
    match fs::symlink_metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(folder, error)),
        Ok(_) => Err(Error::refusal(
            folder.display().to_string(),
            "a path where nothing exists yet",
            "a file or folder",
            "remove it or choose another output folder",
        )),
    }
}

fn partial_path(folder: &Path) -> Result<PathBuf, Error> {
    let Some(name) = folder.file_name() else {
        return Err(Error::refusal(
            folder.display().to_string(),
            "the path of a new folder",
            "a path without a name",
            "choose another output folder",
        ));
    };
    let mut name = name.to_owned();
    name.push(".partial");
    Ok(folder.with_file_name(name))
}

/// Removes what a killed run left.
fn remove_stale(partial: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(partial) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(partial),
        Ok(_) => fs::remove_file(partial),
    };
    removed.map_err(|source| Error::io(partial, source))
}

fn parent(folder: &Path) -> &Path {
    match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A renamed or created file is durable when its folder is.
fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(|source| Error::io(folder, source))
}

/// A write that failed; a full disk says how many bytes the file needs.
pub(super) fn write_error(path: &Path, needed: u64, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::refusal(
                path.display().to_string(),
                format!("room for {needed} bytes"),
                source.to_string(),
                format!("free {needed} bytes on this disk or choose another output folder"),
            )
        }
        _ => Error::io(path, source),
    }
}
