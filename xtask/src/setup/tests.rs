//! The set-up machinery on made-up components, without network.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::text::{Part, part};
use super::{Component, Context, ensure_components};
use crate::error::TaskError;
use crate::workspace::Workspace;

fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let path = context.workspace.root().join("recipe");
    fs::read(&path).map_err(TaskError::io(&path, "read"))
}

fn checkout(recipe: &str) -> (tempfile::TempDir, Workspace) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("recipe"), recipe).unwrap();
    let workspace = Workspace::at(folder.path());
    (folder, workspace)
}

static MADE: AtomicUsize = AtomicUsize::new(0);

const COUNTED: Component = Component {
    title: "counted",
    folder: "counted",
    recipe,
    produce: |_, staging| {
        MADE.fetch_add(1, Ordering::Relaxed);
        fs::write(staging.join("file"), "content").unwrap();
        Ok(vec![PathBuf::from("file")])
    },
};

#[test]
fn a_component_is_made_once_and_again_when_its_recipe_or_files_change() {
    let (_folder, workspace) = checkout("one");
    let context = Context {
        workspace: &workspace,
        offline: true,
    };
    let ensure = || ensure_components(&context, &[COUNTED]);
    let file = workspace.runtime().join("counted/file");
    for (change, made) in [
        ("first", 1),
        ("nothing", 1),
        ("recipe", 2),
        ("file gone", 3),
        ("file cut", 4),
        ("stamp", 5),
    ] {
        match change {
            "recipe" => fs::write(workspace.root().join("recipe"), "two").unwrap(),
            "file gone" => fs::remove_file(&file).unwrap(),
            "file cut" => fs::write(&file, "cont").unwrap(),
            "stamp" => fs::write(file.with_file_name("setup.json"), "{").unwrap(),
            _ => {}
        }
        ensure().unwrap();
        assert_eq!(MADE.load(Ordering::Relaxed), made, "after: {change}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    }
}

#[test]
fn a_half_finished_install_never_stands_at_its_place() {
    const BROKEN: Component = Component {
        title: "broken",
        folder: "broken",
        recipe,
        produce: |context, staging| {
            fs::write(staging.join("half"), "half").unwrap();
            let path = Path::new("network");
            if context.offline {
                Err(TaskError::io(path, "reach")(std::io::Error::other("down")))
            } else {
                Ok(vec![])
            }
        },
    };
    let (_folder, workspace) = checkout("one");
    let place = workspace.runtime().join("broken");
    let error = ensure_components(
        &Context {
            workspace: &workspace,
            offline: true,
        },
        &[BROKEN],
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "network: cannot reach: down");
    assert!(!place.exists());
    ensure_components(
        &Context {
            workspace: &workspace,
            offline: false,
        },
        &[BROKEN],
    )
    .unwrap();
    assert!(place.join("half").is_file());
}

#[test]
fn no_year_is_in_both_texts() {
    let line =
        |name: &str, year: u32, kind: &str| format!("{name},{year},d,p,P,Pp,x,{kind},True,u,r,1,s");
    assert_eq!(
        part(&line("a", 1965, "spoken")),
        Some(("a", Part::Evaluation))
    );
    assert_eq!(
        part(&line("b", 1966, "spoken")),
        Some(("b", Part::Calibration))
    );
    for (year, kind) in [(1965, "written"), (1955, "spoken"), (1956, "spoken")] {
        assert_eq!(part(&line("c", year, kind)), None, "{year} {kind}");
    }
    assert_eq!(part("fileid,year,date"), None);
}
