//! Which compiler builds for the bare machine, what has to be installed for it, and how it is called.
//!
//! Two routes. With rustup, the target's libraries are downloaded. With Debian, its compiler and library
//! source are used and the libraries are built; that needs unstable switches of cargo, which
//! `RUSTC_BOOTSTRAP` allows in the environment of that one child process.

use crate::devicetree::FDTPUT;
use crate::emulator::Emulator;
use crate::report::Environment;
use crate::tree::Tree;
use crate::ui::command_line;
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target of every bare-metal image.
pub(crate) const TARGET: &str = "aarch64-unknown-none-softfloat";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What a verb cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A compiler for the target.
    Build,
    /// The emulator.
    Qemu,
    /// What alters device trees, for some scenarios.
    DeviceTree,
    /// Clippy for the target.
    Lint,
}

impl Need {
    /// Everything.
    pub(crate) const ALL: [Self; 4] = [Self::Build, Self::Qemu, Self::DeviceTree, Self::Lint];
    /// For all boots of a test run.
    pub(crate) const BOOTS: [Self; 3] = [Self::Build, Self::Qemu, Self::DeviceTree];

    /// Debian's packages for this need on a route.
    fn packages(self, route: Route) -> &'static [&'static str] {
        match (self, route) {
            (Self::Qemu, _) => &["qemu-system-arm"],
            (Self::DeviceTree, _) => &["device-tree-compiler"],
            (Self::Build, Route::Debian) => &["rustc-web", "rust-web-src"],
            (Self::Lint, Route::Debian) => &["rust-web-clippy"],
            (Self::Build | Self::Lint, Route::Rustup) => &[],
        }
    }
}

/// Where the compiler comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// `rustup target add`.
    Rustup,
    /// Debian's `rustc-web`.
    Debian,
}

impl Route {
    /// Reads `DEED_TOOLCHAIN`; `None` if it is not set.
    fn by_hand() -> Result<Option<Self>> {
        match std::env::var("DEED_TOOLCHAIN").as_deref() {
            Err(_) | Ok("") => Ok(None),
            Ok("rustup") => Ok(Some(Self::Rustup)),
            Ok("debian") => Ok(Some(Self::Debian)),
            Ok(other) => bail!("DEED_TOOLCHAIN is `{other}`: it may be `rustup` or `debian`"),
        }
    }
}

/// What is on this machine, as far as the choice of a route depends on it.
#[derive(Clone, Copy, Debug, Default)]
struct Installed {
    rustup_target: bool,
    debian_packages: bool,
}

/// What to do about a compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Use(Route),
    /// Try `rustup target add`; if that fails, Debian's packages.
    TryRustup,
    AddRustupTarget,
    InstallDebian,
}

/// The order of preference: the choice by hand; what is there already; a download; packages.
fn choose(by_hand: Option<Route>, installed: Installed) -> Plan {
    match by_hand {
        Some(Route::Rustup) if installed.rustup_target => Plan::Use(Route::Rustup),
        Some(Route::Rustup) => Plan::AddRustupTarget,
        Some(Route::Debian) if installed.debian_packages => Plan::Use(Route::Debian),
        Some(Route::Debian) => Plan::InstallDebian,
        None if installed.rustup_target => Plan::Use(Route::Rustup),
        None if installed.debian_packages => Plan::Use(Route::Debian),
        None => Plan::TryRustup,
    }
}

/// A compiler that is ready for use.
#[derive(Debug)]
pub(crate) struct Toolchain {
    route: Route,
    /// For Debian's compiler, which comes without one.
    linker: Option<PathBuf>,
    version: String,
}

impl Toolchain {
    /// Installs what is missing for `needs` and returns the compiler. At a terminal it asks first.
    pub(crate) fn ensure(needs: &[Need]) -> Result<Self> {
        let installed = Installed {
            rustup_target: has_rustup_target(),
            debian_packages: Need::Build.is_there(Route::Debian),
        };
        let route = match choose(Route::by_hand()?, installed) {
            Plan::Use(route) => route,
            Plan::AddRustupTarget => {
                ensure!(add_rustup_target()?, "rustup cannot add the target {TARGET}");
                Route::Rustup
            }
            Plan::TryRustup if add_rustup_target()? => Route::Rustup,
            Plan::TryRustup | Plan::InstallDebian => Route::Debian,
        };
        let missing: Vec<&str> = needs
            .iter()
            .filter(|need| !need.is_there(route))
            .flat_map(|need| need.packages(route))
            .copied()
            .collect();
        install(&missing)?;
        for need in needs {
            ensure!(need.is_there(route), "{need:?} is still missing after the installation");
        }
        let linker = match route {
            Route::Rustup => None,
            Route::Debian => Some(find_linker()?),
        };
        let rustc = if route == Route::Debian { DEBIAN_RUSTC } else { "rustc" };
        let version = output_of(Command::new(rustc).arg("-V")).context("the compiler does not run")?;
        Ok(Self { route, linker, version })
    }

    /// A cargo command for the bare machine; `verb` is `build`, `clippy` or `doc`.
    pub(crate) fn cargo(&self, tree: &Tree, verb: &str) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = match (self.route, verb) {
            // Rustup's own `cargo clippy` would take rustup's driver, which is for another compiler.
            (Route::Debian, "clippy") => Command::new("/usr/bin/cargo-clippy"),
            _ => Command::new(cargo),
        };
        command.current_dir(&tree.root).arg(verb);
        if self.route == Route::Debian {
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").env("RUSTDOC", "/usr/bin/rustdoc");
            command.arg("-Zbuild-std=core,alloc");
        }
        if let Some(linker) = &self.linker {
            command.env("CARGO_TARGET_AARCH64_UNKNOWN_NONE_SOFTFLOAT_LINKER", linker);
        }
        command.args(["--target", TARGET, "--target-dir"]).arg(tree.bare_metal_target());
        command
    }

    /// Version of the compiler that builds what runs on this machine.
    pub(crate) fn version_of_build_machine() -> String {
        output_of(Command::new("rustc").arg("-V")).unwrap_or_default()
    }

    /// Puts versions into a report: its own, and that of the installed QEMU.
    pub(crate) fn note_versions(&self, environment: &mut Environment) {
        environment.rustc.clone_from(&self.version);
        environment.qemu = Emulator::default().version();
    }

    /// One line for people.
    pub(crate) fn describe(&self) -> String {
        let route = match self.route {
            Route::Rustup => "rustup's target",
            Route::Debian => "Debian's compiler",
        };
        match &self.linker {
            Some(linker) => format!("{route}, {}, linker {}", self.version, linker.display()),
            None => format!("{route}, {}", self.version),
        }
    }
}

impl Need {
    fn is_there(self, route: Route) -> bool {
        match (self, route) {
            (Self::Qemu, _) => Emulator::default().version().is_some(),
            (Self::DeviceTree, _) => output_of(Command::new(FDTPUT).arg("--version")).is_some(),
            (Self::Build, Route::Rustup) => has_rustup_target(),
            (Self::Lint, Route::Rustup) => output_of(Command::new("cargo").args(["clippy", "-V"])).is_some(),
            (_, Route::Debian) => self.packages(route).iter().all(|package| is_package_installed(package)),
        }
    }
}

/// LLVM's readers of the profiles that instrumented programs write. They must be of the compiler's LLVM or a later
/// one.
#[derive(Debug)]
pub(crate) struct ProfileTools {
    pub(crate) cov: PathBuf,
    pub(crate) profdata: PathBuf,
}

impl ProfileTools {
    /// Finds rustup's tools or Debian's; installs Debian's if there are none.
    pub(crate) fn ensure() -> Result<Self> {
        let version = output_of(Command::new("rustc").arg("-vV")).context("the compiler does not run")?;
        let llvm = llvm_of(&version).context("the compiler does not say which LLVM it has")?;
        if let Some(tools) = Self::find(llvm) {
            return Ok(tools);
        }
        let package = format!("llvm-{llvm}");
        install(&[&package])?;
        Self::find(llvm).with_context(|| format!("no llvm-cov of LLVM {llvm} after {package} was installed"))
    }

    fn find(llvm: u32) -> Option<Self> {
        let own = rustup_programs();
        let debian = Some(PathBuf::from(format!("/usr/lib/llvm-{llvm}/bin")));
        let mut folders = own.into_iter().chain(debian);
        let folder = folders.find(|folder| folder.join("llvm-cov").is_file())?;
        Some(Self { cov: folder.join("llvm-cov"), profdata: folder.join("llvm-profdata") })
    }
}

/// The major version of LLVM in what `rustc -vV` prints.
fn llvm_of(version: &str) -> Option<u32> {
    let version = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

/// Every package and tool that `setup` may install, by route: the same text on every machine.
pub(crate) fn plan() -> String {
    let debian: Vec<&str> = Need::ALL.iter().flat_map(|need| need.packages(Route::Debian)).copied().collect();
    let rustup: Vec<&str> = Need::ALL.iter().flat_map(|need| need.packages(Route::Rustup)).copied().collect();
    format!(
        "# What `cargo xtask setup` installs where it is missing. Nothing else is touched.\n\
         \n\
         DEED_TOOLCHAIN=debian\n\
         apt-get install --no-install-recommends {}\n\
         if rustup has no rust-lld: apt-get install --no-install-recommends {LINKER_PACKAGE}\n\
         \n\
         DEED_TOOLCHAIN=rustup\n\
         rustup target add {TARGET}\n\
         apt-get install --no-install-recommends {}\n\
         \n\
         DEED_TOOLCHAIN not set\n\
         rustup's target if it is installed; else Debian's compiler if it is; else as for rustup; else as for debian\n\
         \n\
         # `cargo xtask coverage` alone, where rustup has no llvm-tools. N is the LLVM of `rustc -vV`.\n\
         apt-get install --no-install-recommends llvm-N\n",
        debian.join(" "),
        rustup.join(" "),
    )
}

const LINKER_PACKAGE: &str = "binutils-aarch64-linux-gnu";

fn has_rustup_target() -> bool {
    let folder = output_of(Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]));
    folder.is_some_and(|folder| Path::new(folder.trim()).is_dir())
}

fn is_package_installed(package: &str) -> bool {
    let status = output_of(Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]));
    status.is_some_and(|status| status.contains("install ok installed"))
}

fn add_rustup_target() -> Result<bool> {
    let mut command = Command::new("rustup");
    command.args(["target", "add", TARGET]);
    if output_of(Command::new("rustup").arg("-V")).is_none() {
        return Ok(false);
    }
    agree(&command)?;
    // A failure to download is an answer, not an error: the other route is tried then.
    Ok(command.status().is_ok_and(|status| status.success()) && has_rustup_target())
}

/// The folder of the programs that come with rustup's compiler.
fn rustup_programs() -> Option<PathBuf> {
    let sysroot = output_of(Command::new("rustc").args(["--print", "sysroot"]))?;
    let host = output_of(Command::new("rustc").args(["--print", "host-tuple"]))?;
    Some(Path::new(&sysroot).join("lib/rustlib").join(host).join("bin"))
}

fn find_linker() -> Result<PathBuf> {
    let candidates = || {
        let own = rustup_programs().map(|folder| folder.join("rust-lld"));
        let gnu = PathBuf::from("/usr/bin/aarch64-linux-gnu-ld");
        own.into_iter().chain([gnu]).find(|path| path.is_file())
    };
    if candidates().is_none() {
        install(&[LINKER_PACKAGE])?;
    }
    candidates().context("no linker for the target")
}

/// Installs Debian packages, if there are any to install.
fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if output_of(Command::new("apt-get").arg("--version")).is_none() {
        bail!(
            "missing here: {}. This system has no apt-get: install the same by its own means",
            packages.join(", ")
        );
    }
    let is_root = output_of(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0");
    let apt = |args: &[&str]| {
        let mut command = Command::new(if is_root { "apt-get" } else { "sudo" });
        if !is_root {
            command.arg("apt-get");
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=120"]).args(args);
        command
    };
    let mut command = apt(&["install", "-y", "--no-install-recommends"]);
    command.args(packages);
    agree(&command)?;
    let update = apt(&["update"]).status().context("cannot start apt-get")?;
    ensure!(update.success(), "apt-get update failed");
    let status = command.status().context("cannot start apt-get")?;
    ensure!(status.success(), "the installation of {} failed", packages.join(", "));
    Ok(())
}

/// Whether a person is there to answer.
pub(crate) fn is_attended() -> bool {
    std::io::stdin().is_terminal() && std::env::var_os("CI").is_none()
}

/// Says what is about to be run. Asks first where a person is at the terminal; does not where none is.
fn agree(command: &Command) -> Result<()> {
    eprintln!("missing here, to be installed by: {}", command_line(command));
    if !is_attended() {
        return Ok(());
    }
    eprint!("Install? [Y/n] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    ensure!(matches!(answer.trim(), "" | "y" | "Y" | "yes"), "not installed, as you wish");
    Ok(())
}

/// What a command prints; `None` if it cannot be started or fails.
fn output_of(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_is_preferred_and_the_choice_by_hand_is_kept() {
        let nothing = Installed::default();
        let debian = Installed { debian_packages: true, ..nothing };
        let both = Installed { rustup_target: true, debian_packages: true };
        assert_eq!(choose(None, both), Plan::Use(Route::Rustup));
        assert_eq!(choose(None, debian), Plan::Use(Route::Debian));
        assert_eq!(choose(None, nothing), Plan::TryRustup);
        assert_eq!(choose(Some(Route::Debian), both), Plan::Use(Route::Debian));
        assert_eq!(choose(Some(Route::Debian), nothing), Plan::InstallDebian);
        assert_eq!(choose(Some(Route::Rustup), debian), Plan::AddRustupTarget);
    }

    #[test]
    fn the_plan_names_every_package_of_every_need() {
        let plan = plan();
        for need in Need::ALL {
            for route in [Route::Rustup, Route::Debian] {
                assert!(need.packages(route).iter().all(|package| plan.contains(package)));
            }
        }
        assert!(plan.contains(TARGET));
    }

    #[test]
    fn the_llvm_of_a_compiler_is_read() {
        assert_eq!(llvm_of("rustc 1.95.0 (5 2026)\nhost: x86\nLLVM version: 22.1.2"), Some(22));
        assert_eq!(llvm_of("rustc 1.95.0 (5 2026)\nhost: x86"), None);
    }

    #[test]
    fn the_committed_plan_is_the_present_one() {
        let tree = Tree::of_this_checkout().unwrap();
        assert_eq!(std::fs::read_to_string(tree.root.join("xtask/setup-plan.txt")).unwrap(), plan());
    }
}
