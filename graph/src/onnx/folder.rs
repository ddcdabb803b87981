//! A folder of ONNX files that share one file of weights.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{Scope, ScopedJoinHandle},
};

use mlac_model::Refusal;
use prost::Message as _;

use super::{
    WeightSource, lower,
    memory::{StreamError, infallible, stream},
    proto::{StringStringEntryProto, tensor_proto::DataLocation},
};
use crate::{
    error::Error,
    ir::{DType, Transform, WeightRef},
    validate::ValidGraph,
};

/// Tensors of at least a page start on one, so that a runtime can map them.
const PAGE: u64 = 4096;
/// Smaller tensors start on a cache line.
const LINE: u64 = 64;

/// How far the writing of a folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that was written last.
    pub tensor: &'a str,
    /// Bytes of weights written.
    pub done: u64,
    /// Bytes of weights to write.
    pub total: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteReport {
    /// The graphs' files and the data file, in this order.
    pub files: Vec<PathBuf>,
    /// Distinct tensors in the data file.
    pub tensors: usize,
    /// Bytes of the data file.
    pub data_bytes: u64,
    /// Bytes of the graphs' files together.
    pub graph_bytes: u64,
}

/// Writes each graph under its file name into `folder`, which exists, and the weights of all of
/// them once into `data_file` beside them.
///
/// Weights are streamed: memory holds the source's one tensor (nothing of one that is stored as the graph
/// has it) and a few pieces of 8 MiB. Equal inputs give
/// equal bytes. The caller stages the folder and renames it when this returns.
pub fn write_folder(
    folder: &Path,
    graphs: &[(&str, &ValidGraph)],
    data_file: &str,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<WriteReport, Error> {
    check_names(graphs, data_file)?;
    let plan = Plan::new(graphs);
    let data_path = folder.join(data_file);
    write_data(&data_path, &plan, source, progress)?;
    let mut files = vec![];
    let mut graph_bytes = 0;
    for (name, graph) in graphs {
        let model = infallible(lower::model(graph, |weight, tensor| {
            let entry = |key: &str, value: String| StringStringEntryProto {
                key: Some(key.to_owned()),
                value: Some(value),
            };
            tensor.data_location = Some(DataLocation::External as i32);
            tensor.external_data = vec![
                entry("location", data_file.to_owned()),
                entry("offset", plan.offset(weight).to_string()),
                entry("length", weight.bytes().to_string()),
            ];
            Ok(())
        }));
        let path = folder.join(name);
        let bytes = model.encode_to_vec();
        std::fs::write(&path, &bytes).map_err(|source| Error::Io {
            path: path.clone(),
            action: "write",
            source,
        })?;
        graph_bytes += bytes.len() as u64;
        files.push(path);
    }
    files.push(data_path);
    Ok(WriteReport {
        files,
        tensors: plan.order.len(),
        data_bytes: plan.total,
        graph_bytes,
    })
}

fn check_names(graphs: &[(&str, &ValidGraph)], data_file: &str) -> Result<(), Refusal> {
    let mut names: Vec<&str> = graphs.iter().map(|g| g.0).collect();
    names.push(data_file);
    for (i, name) in names.iter().enumerate() {
        let plain = Path::new(name).file_name().is_some_and(|f| f == *name);
        if !plain || names[..i].contains(name) {
            return Err(Refusal::new(
                format!("file name {name:?}"),
                "distinct plain names inside the output folder",
                names.join(", "),
                "give every graph and the data file a name of its own",
            ));
        }
    }
    Ok(())
}

type Key<'g> = (&'g str, &'g [usize], Transform, DType);

/// Where each distinct tensor lies in the data file.
struct Plan<'g> {
    offsets: BTreeMap<Key<'g>, u64>,
    order: Vec<(&'g WeightRef, u64)>,
    total: u64,
}

impl<'g> Plan<'g> {
    fn new(graphs: &[(&str, &'g ValidGraph)]) -> Self {
        let mut plan = Self {
            offsets: BTreeMap::new(),
            order: vec![],
            total: 0,
        };
        for weight in graphs.iter().flat_map(|(_, g)| g.graph().weights()) {
            if plan.offsets.contains_key(&weight.content_key()) {
                continue;
            }
            let bytes = weight.bytes() as u64;
            let offset = plan
                .total
                .next_multiple_of(if bytes >= PAGE { PAGE } else { LINE });
            plan.offsets.insert(weight.content_key(), offset);
            plan.order.push((weight, offset));
            plan.total = offset + bytes;
        }
        plan
    }

    fn offset(&self, weight: &WeightRef) -> u64 {
        self.offsets[&weight.content_key()]
    }
}

fn write_data(
    path: &Path,
    plan: &Plan<'_>,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), Error> {
    let io = |action| {
        move |source| Error::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let file = File::create(path).map_err(io("create"))?;
    std::thread::scope(|scope| {
        let mut pump = Pump::start(scope, file);
        for &(weight, offset) in &plan.order {
            let padding = vec![0; (offset - pump.at) as usize];
            pump.send(&padding).map_err(io("write"))?;
            stream(weight, source, &mut |bytes| pump.send(bytes)).map_err(|e| match e {
                StreamError::Error(e) => e,
                StreamError::Io(source) => io("write")(source),
            })?;
            progress(Progress {
                tensor: &weight.name,
                done: pump.at,
                total: plan.total,
            });
        }
        pump.finish().map_err(io("write"))
    })
}

/// Bytes that are on their way to the file at once, in pieces.
const PIECE: usize = 8 << 20;
/// Pieces on their way besides the one being filled and the one being written.
const QUEUE: usize = 2;

/// Writes on a thread of its own what it is given, in large pieces, so that reading and checking go on.
struct Pump<'scope> {
    /// The piece being filled.
    piece: Vec<u8>,
    /// Bytes taken so far.
    at: u64,
    full: Option<SyncSender<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    thread: Option<ScopedJoinHandle<'scope, io::Result<()>>>,
}

impl<'scope> Pump<'scope> {
    fn start(scope: &'scope Scope<'scope, '_>, mut file: File) -> Self {
        let (full, pieces) = sync_channel::<Vec<u8>>(QUEUE);
        let (back, empty) = sync_channel(QUEUE + 2);
        for _ in 0..=QUEUE {
            // There is room for all of them.
            let _ = back.send(Vec::with_capacity(PIECE));
        }
        let thread = scope.spawn(move || {
            for mut piece in pieces {
                file.write_all(&piece)?;
                piece.clear();
                // Nobody waits for it when the sender has finished.
                let _ = back.send(piece);
            }
            Ok(())
        });
        Self {
            piece: Vec::with_capacity(PIECE),
            at: 0,
            full: Some(full),
            empty,
            thread: Some(thread),
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        while !bytes.is_empty() {
            let fits = bytes.len().min(PIECE - self.piece.len());
            self.piece.extend_from_slice(&bytes[..fits]);
            bytes = &bytes[fits..];
            if self.piece.len() == PIECE {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    /// Passes the piece on and takes an empty one; when the thread has stopped, says why.
    fn hand_over(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        let sent = self.full.as_ref().is_some_and(|f| f.send(piece).is_ok());
        match (sent, self.empty.recv()) {
            (true, Ok(empty)) => {
                self.piece = empty;
                Ok(())
            }
            _ => Err(self
                .join()
                .err()
                .unwrap_or_else(|| io::Error::other("the writing thread stopped"))),
        }
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            self.hand_over()?;
        }
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        self.full = None;
        match self.thread.take().map(ScopedJoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the writing thread panicked")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
