//! `cargo xtask qemu`: boots one scenario and says whether it passed.

use crate::boot::{self, Options};
use crate::emulator::{Emulator, Which};
use crate::images::Builder;
use crate::linux::{self, Kernel};
use crate::report::Report;
use crate::scenario::{Overrides, Payload, Scenario};
use crate::toolchain::{Need, Toolchain, is_attended};
use crate::tree::Tree;
use crate::ui::seconds;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// The name of Debian's kernel as a host.
const LINUX: [(&str, Kernel, &str); 2] = [
    ("linux", Kernel::Stable, "linux-is-the-host"),
    ("linux-newest", Kernel::Newest, "the-newest-linux-is-the-host"),
];

/// Boot Deed in QEMU with one scenario (qemu/README.md) and check what it shows.
///
/// The console is shown live and kept in target/deed/SCENARIO.log. Ends by itself; the exit status is 0 if
/// everything that the scenario asks for was seen.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of a file in qemu/scenarios, without .toml.
    #[arg(long, value_name = "NAME", default_value = "default")]
    scenario: String,
    /// Boot this image as the host instead of Deed's own: any that boots as an arm64 Linux kernel does at EL1.
    ///
    /// Passes if the run ends with the hypervisor's verdict: the host turns the machine off, and no step that it
    /// prints has failed. `linux` stands for the kernel of Debian 13, `linux-newest` for the newest that Debian has: they
    /// are fetched once (Debian's apt is needed), and have a shell at a terminal; with --json, or without a terminal, they
    /// are the scenarios linux-is-the-host and the-newest-linux-is-the-host.
    #[arg(long, value_name = "FILE", conflicts_with = "scenario")]
    host: Option<PathBuf>,
    /// A ramdisk for that host.
    #[arg(long, value_name = "FILE", requires = "host")]
    ramdisk: Option<PathBuf>,
    /// Boot arguments of that host.
    #[arg(long, value_name = "TEXT", requires = "host", default_value = "")]
    append: String,
    /// Run this program as a protected guest of Deed's own host: a raw binary, or an ELF file, which is made one.
    ///
    /// It is loaded at 0x80000000, the first of 4 MiB, and entered at its first byte, at EL1 with the MMU off and x0 = 0
    /// (guest-stub/README.md). Passes if it turns itself off, and no step that it prints has failed.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scenario", "host"])]
    guest: Option<PathBuf>,
    /// RAM of the machine, such as 512M or 16G.
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// CPU model: cortex-a53, cortex-a76, max, or another that QEMU knows.
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Number of CPUs.
    #[arg(long, value_name = "N")]
    smp: Option<u32>,
    /// Build without test calls and with full optimisation.
    #[arg(long)]
    release: bool,
    /// Boot the image that runs the specification beside every transition and stops at the first disagreement.
    ///
    /// Prints what that costs in instructions, which QEMU counts for it. Without the control run, whose image
    /// breaks a rule.
    #[arg(long, conflicts_with_all = ["release", "gdb"])]
    oracle: bool,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// End QEMU after this time instead of the scenario's.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Stop before the first instruction, wait for a debugger, and say how to attach one. No timeout.
    #[arg(long)]
    gdb: bool,
    /// Which QEMU: the installed one, or the newest of Debian, fetched once.
    #[arg(long, value_enum, default_value_t)]
    qemu: Which,
    /// Print command lines.
    #[arg(long, short)]
    verbose: bool,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    Report::new("qemu").around(args.json.as_deref(), |report| {
        report.env.rustc = Toolchain::version_of_build_machine();
        let linux = LINUX.iter().find(|(name, ..)| args.host.as_deref() == Some(Path::new(name)));
        let is_shell = linux.is_some() && args.json.is_none() && is_attended();
        let scenario = match (&args.host, linux) {
            (_, Some((_, kernel, _))) if is_shell => {
                Scenario::of_payload(linux::payload(tree, *kernel, "shell")?)
            }
            (_, Some((.., scenario))) => Scenario::load(tree, scenario)?,
            (Some(host), None) => Scenario::of_payload(payload(host, args)?),
            (None, None) if args.guest.is_some() => Scenario::of_guest(),
            (None, None) => Scenario::load(tree, &args.scenario)?,
        };
        let by_hand = Overrides { memory: args.memory.clone(), cpu: args.cpu.clone(), smp: args.smp };
        let machine = scenario.machine(&by_hand);
        report.env.note_machine(&machine);
        let needs: &[Need] = match scenario.tree.as_slice() {
            [] => &[Need::Build, Need::Qemu],
            _ => &Need::BOOTS,
        };
        let toolchain = Toolchain::ensure(needs)?;
        toolchain.note_versions(&mut report.env);
        let emulator = Emulator::get(tree, args.qemu)?;
        report.env.qemu = emulator.version();

        let mut builder = Builder::new(tree, &toolchain, args.release, args.verbose);
        if let Some(guest) = &args.guest {
            let file = std::fs::read(guest).with_context(|| format!("the guest {}", guest.display()))?;
            builder = builder.with_guest(file)?;
        }
        let options = Options {
            emulator,
            live: true,
            typed: is_shell,
            verbose: args.verbose,
            gdb: args.gdb,
            oracle: args.oracle,
            control: !args.gdb && !args.oracle,
            timeout: args.timeout,
            label: scenario.name.clone(),
            ..Options::default()
        };
        let outcome = boot::scenario(tree, &builder, &scenario, &machine, &options)?;
        let pass = outcome.pass();
        for check in &outcome.checks {
            if check.pass {
                println!("ok   {}: {}", check.name, check.observed);
            } else {
                println!("FAIL {}", check.complaint());
            }
        }
        let verdict = if pass { "PASSED" } else { "FAILED" };
        let failed = outcome.failures().count();
        println!(
            "{verdict}: {} on {machine}: {} checks passed, {failed} failed in {} (console: {})",
            scenario.name,
            outcome.checks.len() - failed,
            seconds(outcome.duration),
            tree.show(&outcome.log),
        );
        report.add(outcome.checks);
        Ok(pass)
    })
}

/// The host that was asked for, if its files are there.
fn payload(host: &Path, args: &Args) -> Result<Payload> {
    for file in std::iter::once(host).chain(args.ramdisk.as_deref()) {
        ensure!(file.is_file(), "there is no file {}", file.display());
    }
    Ok(Payload { host: host.to_owned(), ramdisk: args.ramdisk.clone(), append: args.append.clone() })
}
