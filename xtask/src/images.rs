//! Builds the images: the hypervisor with the features that a scenario asks for, and once per run the host,
//! its programs and the guests, packed into a ramdisk. Results are in `target/deed/PROFILE/`.

use crate::cpio::Archive;
use crate::elf;
use crate::oracle;
use crate::toolchain::Toolchain;
use crate::tree::Tree;
use crate::ui::{Task, command_line};
use anyhow::{Context, Result, anyhow, bail, ensure};
use object::elf::ELFMAG;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

/// Packages whose programs go into the ramdisk as `bin/NAME`.
const PROGRAMS: &str = "host-programs";
/// Packages whose programs go into the ramdisk as `guests/NAME.bin`, flat.
const GUESTS: &str = "guest-stub";
/// Bytes of RAM that the host's programs give a guest (`guest_stub::protocol::RAM_SIZE`).
const GUEST_RAM: usize = 4 << 20;
const HOST: &str = "host-stub";
const HYP: &str = "hyp";

/// Files of one boot.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    /// The hypervisor, flat, and its ELF file with symbols.
    pub(crate) hyp: PathBuf,
    pub(crate) hyp_elf: PathBuf,
    /// The host, flat, and its ELF file with symbols.
    pub(crate) host: PathBuf,
    pub(crate) host_elf: PathBuf,
    pub(crate) ramdisk: PathBuf,
    /// Names of the programs in the ramdisk.
    pub(crate) programs: Vec<String>,
}

/// Builds images, each once, whoever asks for them at the same time.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    tree: &'a Tree,
    toolchain: &'a Toolchain,
    release: bool,
    verbose: bool,
    /// A guest of the caller's own, flat: `guests/own.bin`.
    guest: Option<Vec<u8>>,
    /// Held while something is built.
    built: Mutex<Ready>,
}

/// What has been built.
#[derive(Debug, Default)]
struct Ready {
    /// Names of the programs in the ramdisk, once host and ramdisk are there.
    programs: Option<Vec<String>>,
    /// Features of each hypervisor.
    hyps: Vec<Vec<String>>,
}

impl<'a> Builder<'a> {
    /// Nothing is built yet.
    pub(crate) fn new(tree: &'a Tree, toolchain: &'a Toolchain, release: bool, verbose: bool) -> Self {
        Self { tree, toolchain, release, verbose, guest: None, built: Mutex::default() }
    }

    /// Puts another guest into the ramdisk: an ELF file for this machine, or the bytes as they are.
    pub(crate) fn with_guest(self, file: Vec<u8>) -> Result<Self> {
        let guest =
            if file.starts_with(&ELFMAG) { elf::flatten_program(&file).context("the guest")? } else { file };
        ensure!(
            guest.len() <= GUEST_RAM,
            "a guest has {GUEST_RAM} bytes of RAM, this one is {} long",
            guest.len()
        );
        Ok(Self { guest: Some(guest), ..self })
    }

    /// Whether the images serve the test calls.
    pub(crate) fn has_test_calls(&self) -> bool {
        !self.release
    }

    /// Builds what is missing and returns the files. `features` are more features of the hypervisor.
    pub(crate) fn images(&self, features: &[String]) -> Result<Images> {
        let folder = self.folder();
        std::fs::create_dir_all(&folder)?;
        let mut built = self.built.lock().map_err(|_| anyhow!("another build failed"))?;
        let programs = match &built.programs {
            Some(programs) => programs.clone(),
            None => built.programs.insert(self.build_host(&folder)?).clone(),
        };
        let name = [&[HYP.to_owned()], features].concat().join("+");
        if !built.hyps.iter().any(|hyp| hyp == features) {
            self.build_hyp(&folder, &name, features)?;
            built.hyps.push(features.to_vec());
        }
        Ok(Images {
            hyp: folder.join(format!("{name}.img")),
            hyp_elf: folder.join(format!("{name}.elf")),
            host: folder.join("host.img"),
            host_elf: folder.join("host.elf"),
            ramdisk: folder.join("ramdisk.cpio"),
            programs,
        })
    }

    fn folder(&self) -> PathBuf {
        self.tree.results().join(if self.release { "release" } else { "dev" })
    }

    fn build_hyp(&self, folder: &Path, name: &str, features: &[String]) -> Result<()> {
        let mut all = vec!["image"];
        if self.has_test_calls() {
            all.push("test-calls");
        }
        all.extend(features.iter().map(String::as_str));
        let all: Vec<String> = all.iter().map(|feature| format!("{HYP}/{feature}")).collect();
        let built = self.cargo_build(&[HYP], &all)?;
        let elf = built.only(HYP)?;
        let flat = elf::flatten(&elf)?;
        elf::check_arm64_header(&flat).context("the hypervisor's image")?;
        oracle::check_image(&elf, features.iter().any(|feature| feature == oracle::FEATURE))?;
        std::fs::write(folder.join(format!("{name}.img")), flat)?;
        std::fs::write(folder.join(format!("{name}.elf")), elf)?;
        Ok(())
    }

    /// Builds host and ramdisk; returns the names of the programs.
    fn build_host(&self, folder: &Path) -> Result<Vec<String>> {
        let packages = [HOST, PROGRAMS, GUESTS];
        let features = packages.map(|package| format!("{package}/image"));
        let built = self.cargo_build(&packages, &features)?;
        let elf = built.only(HOST)?;
        let flat = elf::flatten(&elf)?;
        elf::check_arm64_header(&flat).context("the host's image")?;
        std::fs::write(folder.join("host.img"), flat)?;
        std::fs::write(folder.join("host.elf"), elf)?;

        let mut ramdisk = Archive::default();
        ramdisk.directory("bin");
        let programs = built.of(PROGRAMS);
        for (name, path) in &programs {
            let program = elf::without_sections(std::fs::read(path)?)?;
            ramdisk.file(&format!("bin/{name}"), &program);
        }
        ramdisk.directory("guests");
        for (name, path) in built.of(GUESTS) {
            let flat = elf::flatten(&std::fs::read(path)?).with_context(|| format!("guest {name}"))?;
            ramdisk.file(&format!("guests/{name}.bin"), &flat);
            std::fs::copy(path, folder.join(format!("guest-{name}.elf")))?;
        }
        if let Some(guest) = &self.guest {
            ramdisk.file("guests/own.bin", guest);
        }
        std::fs::write(folder.join("ramdisk.cpio"), ramdisk.finish())?;
        Ok(programs.into_keys().map(str::to_owned).collect())
    }

    fn cargo_build(&self, packages: &[&str], features: &[String]) -> Result<Built> {
        let mut command = self.toolchain.cargo(self.tree, "build");
        command.args(["--message-format=json-render-diagnostics", "--bins"]);
        for package in packages {
            command.args(["--package", package]);
        }
        command.args(["--features", &features.join(",")]);
        if self.release {
            command.arg("--release");
        }
        if self.verbose {
            eprintln!("{}", command_line(&command));
        } else {
            command.arg("--quiet");
        }
        let profile = if self.release { "release" } else { "dev" };
        let task =
            Task::begin(format!("building {} ({profile}; {})", packages.join(", "), features.join(", ")));
        let output =
            command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
        if !output.status.success() {
            task.done("failed");
            bail!("the build of {} failed", packages.join(", "));
        }
        task.done("built");
        let text = String::from_utf8_lossy(&output.stdout);
        Built::from_messages(&self.tree.root, &text)
    }
}

/// The programs that a build made, by package.
#[derive(Debug, Default)]
struct Built(BTreeMap<String, BTreeMap<String, PathBuf>>);

impl Built {
    /// Reads what `cargo build --message-format=json` prints.
    fn from_messages(root: &Path, text: &str) -> Result<Self> {
        let mut built = Self::default();
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let message: serde_json::Value = serde_json::from_str(line)?;
            let field = |path: &str| message.pointer(path).and_then(serde_json::Value::as_str);
            let (Some(file), Some(manifest), Some(name)) =
                (field("/executable"), field("/manifest_path"), field("/target/name"))
            else {
                continue;
            };
            let package = package_of(root, Path::new(manifest));
            built.0.entry(package).or_default().insert(name.to_owned(), PathBuf::from(file));
        }
        Ok(built)
    }

    fn of(&self, package: &str) -> BTreeMap<&str, &Path> {
        let programs = self.0.get(package).into_iter().flatten();
        programs.map(|(name, path)| (name.as_str(), path.as_path())).collect()
    }

    /// The bytes of a package's only program, the one that has the package's name.
    fn only(&self, package: &str) -> Result<Vec<u8>> {
        let programs = self.of(package);
        ensure!(programs.len() == 1, "{package} has {} programs, not one", programs.len());
        let path = programs.get(package).with_context(|| format!("{package} has no program of its name"))?;
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// The name of a package of this workspace, from where its manifest is.
fn package_of(root: &Path, manifest: &Path) -> String {
    let folder = manifest.parent().and_then(|folder| folder.strip_prefix(root).ok());
    match folder.and_then(Path::to_str).unwrap_or_default() {
        "host-stub/programs" => PROGRAMS.to_owned(),
        folder => folder.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_cargos_messages() {
        let text = r#"
            {"reason":"compiler-artifact","manifest_path":"/d/abi/Cargo.toml","target":{"name":"abi"},"executable":null}
            {"reason":"compiler-artifact","manifest_path":"/d/hyp/Cargo.toml","target":{"name":"hyp"},"executable":"/t/hyp"}
            {"reason":"compiler-artifact","manifest_path":"/d/host-stub/programs/Cargo.toml","target":{"name":"b"},"executable":"/t/b"}
            {"reason":"compiler-artifact","manifest_path":"/d/host-stub/programs/Cargo.toml","target":{"name":"a"},"executable":"/t/a"}
            {"reason":"build-finished","success":true}"#;
        let text: String = text.lines().map(|line| format!("{}\n", line.trim())).collect();
        let built = Built::from_messages(Path::new("/d"), &text).unwrap();
        assert_eq!(built.of("hyp")["hyp"], Path::new("/t/hyp"));
        assert_eq!(built.of(PROGRAMS).into_keys().collect::<Vec<_>>(), ["a", "b"]);
        assert!(built.of(GUESTS).is_empty());
        assert!(built.only(PROGRAMS).is_err());
    }
}
