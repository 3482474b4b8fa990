//! Where things are: the sources, and where results go.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A checkout of Deed and the folder for what is built from it.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    /// Folder of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
}

impl Tree {
    /// The checkout that this command was built from.
    pub(crate) fn of_this_checkout() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().context("xtask is not in a workspace")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => std::path::absolute(dir)?,
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// Folder of xtask's results: images, logs.
    pub(crate) fn results(&self) -> PathBuf {
        self.target.join("deed")
    }

    /// Cargo's target folder of the bare-metal builds. They have one of their own, because they may be made
    /// by another compiler.
    pub(crate) fn bare_metal_target(&self) -> PathBuf {
        self.target.join("bare-metal")
    }

    /// A path as a person would write it: relative to the checkout where it lies inside.
    pub(crate) fn show<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}
