//! `cargo xtask lint`: formatting, clippy for the build machine and for the target, documentation.

use crate::libtest::under_shuttle;
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use crate::ui::{Task, command_line};
use anyhow::{Context, Result};
use std::process::{Command, Stdio};

/// Check formatting, clippy and documentation; every warning is an error.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which checks to make; all if none is given.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Print command lines.
    #[arg(long, short)]
    verbose: bool,
}

/// One check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// rustfmt.
    Fmt,
    /// Clippy on everything that runs on the build machine, tests included.
    Host,
    /// Clippy on the tests whose schedule shuttle decides.
    Threads,
    /// Clippy on the images, for the bare machine.
    Target,
    /// The documentation builds without a warning.
    Doc,
}

impl Part {
    const ALL: [Self; 5] = [Self::Fmt, Self::Host, Self::Threads, Self::Target, Self::Doc];

    fn what(self) -> &'static str {
        match self {
            Self::Fmt => "formatting",
            Self::Host => "clippy for the build machine",
            Self::Threads => "clippy for schedules",
            Self::Target => "clippy for the target",
            Self::Doc => "documentation",
        }
    }

    fn command(self, tree: &Tree) -> Result<Command> {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(&tree.root);
        match self {
            Self::Fmt => cargo.args(["fmt", "--all", "--check"]),
            Self::Host => cargo.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
            Self::Threads => under_shuttle(cargo.arg("clippy")).args(["--lib", "--", "-D", "warnings"]),
            Self::Target => {
                cargo = Toolchain::ensure(&[Need::Build, Need::Lint])?.cargo(tree, "clippy");
                cargo.args(["-p", "hyp", "-p", "host-stub", "-p", "host-programs", "-p", "guest-stub"]);
                cargo.args(["--features", "hyp/image,hyp/test-calls,host-stub/image"]);
                cargo.args(["--features", "host-programs/image,guest-stub/image", "--", "-D", "warnings"])
            }
            Self::Doc => {
                cargo.env("RUSTDOCFLAGS", "-D warnings");
                cargo.args(["doc", "--workspace", "--no-deps", "--document-private-items"])
            }
        };
        Ok(cargo)
    }
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    let parts = if args.parts.is_empty() { &Part::ALL[..] } else { &args.parts };
    let mut failed = Vec::new();
    for part in parts {
        let mut command = part.command(tree)?;
        if args.verbose {
            eprintln!("{}", command_line(&command));
        }
        let task = Task::begin(part.what());
        let status = command.stdin(Stdio::null()).status().context("cannot start cargo")?;
        task.done(if status.success() { "clean" } else { "failed" });
        if !status.success() {
            failed.push(part.what());
        }
    }
    let passed = parts.len() - failed.len();
    if failed.is_empty() {
        println!("PASSED: {passed} checks");
    } else {
        println!("FAILED: {} ({passed} checks passed)", failed.join(", "));
    }
    Ok(failed.is_empty())
}
