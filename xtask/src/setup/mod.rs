//! Installs what the product and its tests load at run time into `target/runtime`.
//!
//! One file per component. A component is produced in a staging folder beside its final place and
//! renamed, so a half-finished install is never taken for a whole one. A stamp holds the digest of
//! everything that decides what the component contains (the pinned list, the recipe, the sources)
//! and the size of each file that must be there; when it still holds, nothing is done.

mod cuda;
mod headers;
mod onnxruntime;
mod pip;
mod python_env;
mod shim;
mod smollm2;
mod stamp;
mod tensorrt_rtx;
mod text;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::TaskError;
use crate::workspace::Workspace;
use stamp::Stamp;

pub(crate) use pip::interpreter;
pub(crate) use python_env::python_path;

/// What a component needs to produce itself.
pub(crate) struct Context<'a> {
    pub(crate) workspace: &'a Workspace,
    /// Refuse instead of using the network.
    pub(crate) offline: bool,
}

/// One thing that set-up installs.
struct Component {
    /// What a person reads while it is installed.
    title: &'static str,
    /// Folder under `target/runtime`.
    folder: &'static str,
    /// Everything that decides the content, as bytes to digest.
    recipe: fn(&Context<'_>) -> Result<Vec<u8>, TaskError>,
    /// Fills the staging folder; returns the files (relative) that must be there afterwards.
    produce: fn(&Context<'_>, &Path) -> Result<Vec<PathBuf>, TaskError>,
}

/// In order: later ones may use earlier ones.
const COMPONENTS: [Component; 10] = [
    onnxruntime::COMPONENT,
    python_env::COMPONENT,
    tensorrt_rtx::COMPONENT,
    smollm2::COMPONENT,
    text::COMPONENT,
    headers::COMPONENT,
    cuda::COMPONENT,
    shim::RTX,
    shim::ENTERPRISE,
    shim::PLUGINS,
];

/// Installs what is missing or out of date. With `offline`, anything missing is an error.
pub(crate) fn ensure(workspace: &Workspace, offline: bool) -> Result<(), TaskError> {
    ensure_components(&Context { workspace, offline }, &COMPONENTS)
}

fn ensure_components(context: &Context<'_>, components: &[Component]) -> Result<(), TaskError> {
    let runtime = context.workspace.runtime();
    fs::create_dir_all(&runtime).map_err(TaskError::io(&runtime, "create the folder"))?;
    let _lock = lock(&runtime)?;
    for component in components {
        ensure_component(context, component, &runtime)?;
    }
    Ok(())
}

/// Two set-ups at once take turns; the second finds everything done.
fn lock(runtime: &Path) -> Result<File, TaskError> {
    let path = runtime.join(".lock");
    let file = File::create(&path).map_err(TaskError::io(&path, "create the lock file"))?;
    file.lock().map_err(TaskError::io(&path, "lock"))?;
    Ok(file)
}

fn ensure_component(
    context: &Context<'_>,
    component: &Component,
    runtime: &Path,
) -> Result<(), TaskError> {
    let place = runtime.join(component.folder);
    let digest = stamp::digest(&(component.recipe)(context)?);
    if Stamp::read(&place).is_some_and(|stamp| stamp.holds(&digest, &place)) {
        return Ok(());
    }
    let started = Instant::now();
    println!("setup: {} ...", component.title);
    let staging = runtime.join(format!(".{}.partial", component.folder));
    remove(&staging)?;
    fs::create_dir_all(&staging).map_err(TaskError::io(&staging, "create the folder"))?;
    let files = (component.produce)(context, &staging)?;
    Stamp::of(digest, &staging, &files)?.write(&staging)?;
    remove(&place)?;
    fs::rename(&staging, &place)
        .map_err(TaskError::io(&place, "move the finished folder into place"))?;
    println!(
        "setup: {} done in {:.1} s",
        component.title,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn remove(folder: &Path) -> Result<(), TaskError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(TaskError::io(folder, "remove the old folder")(error))
        }
        _ => Ok(()),
    }
}

/// Moves a file out of an unpacked wheel to its place in the staging folder.
fn take(from: &Path, to: &Path) -> Result<(), TaskError> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(TaskError::io(parent, "create the folder"))?;
    }
    fs::rename(from, to).map_err(TaskError::io(from, "move the file out of the wheel"))
}

/// The pinned list of that name, which is the recipe of most components.
fn pinned(context: &Context<'_>, list: &str) -> Result<Vec<u8>, TaskError> {
    let path = context.workspace.pins().join(list);
    fs::read(&path).map_err(TaskError::io(&path, "read the pinned list"))
}

#[cfg(test)]
mod tests;
