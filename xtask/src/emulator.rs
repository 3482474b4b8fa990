//! Which QEMU boots: the installed one, or the newest that Debian has, fetched once into a cache.

use crate::debian::{self, Suite};
use crate::tree::Tree;
use crate::ui::Task;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const PROGRAM: &str = "qemu-system-aarch64";
const PACKAGE: &str = "qemu-system-arm";
const SUITE: &str = "sid";

/// Which one, on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Which {
    /// The one in PATH.
    #[default]
    Installed,
    /// The newest of Debian, with its own C library, in target/qemu.
    Newest,
}

/// A QEMU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Emulator {
    /// Where its packages are unpacked; the installed one if nowhere.
    root: Option<Root>,
}

#[derive(Clone, Debug)]
struct Root {
    folder: PathBuf,
    /// The dynamic linker and the libraries below it.
    linker: &'static str,
    libraries: &'static str,
}

impl Emulator {
    /// Gets it, if it is not there.
    ///
    /// # Errors
    /// It cannot be had: there is no Debian, or no network. What is in `root` is whole; what else apt has begun is thrown
    /// away by the next try.
    pub(crate) fn get(tree: &Tree, which: Which) -> Result<Self> {
        if which == Which::Installed {
            return Ok(Self::default());
        }
        let architecture = debian::architecture()?;
        let (linker, libraries) = match architecture.as_str() {
            "amd64" => ("usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
            "arm64" => ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
            other => bail!("it is not known how to run a fetched QEMU on {other}"),
        };
        let cache = std::path::absolute(tree.target.join("qemu"))?;
        let folder = cache.join("root");
        if !folder.is_dir() {
            let task = Task::begin(format!("fetching {PACKAGE} of Debian {SUITE}"));
            let suite = Suite::read(&cache.join("apt"), SUITE, &architecture)?;
            // Moved and not copied: what is in the cache is whole.
            fs::rename(suite.unpack_whole(PACKAGE)?, &folder)?;
            suite.remove()?;
            task.done("fetched");
        }
        let emulator = Self { root: Some(Root { folder, linker, libraries }) };
        emulator.version().context("the fetched QEMU does not run")?;
        Ok(emulator)
    }

    /// A command that starts it.
    pub(crate) fn command(&self) -> Command {
        let Some(Root { folder, linker, libraries }) = &self.root else { return Command::new(PROGRAM) };
        let mut command = Command::new(folder.join(linker));
        command.arg("--library-path").arg(folder.join(libraries));
        command.arg(folder.join("usr/bin").join(PROGRAM));
        command.arg("-L").arg(folder.join("usr/share/qemu"));
        command
    }

    /// What it says of its version; `None` if it does not run.
    pub(crate) fn version(&self) -> Option<String> {
        let output = self.command().arg("--version").stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        text.lines().next().map(str::to_owned)
    }
}
