//! Debian's Linux kernels as the host: fetched once into a cache, with a static busybox, and started with the first
//! program of `qemu/linux/init`.
//!
//! The packages come from Debian's archive by `apt-get download`, under a state of its own: neither the system's list of
//! sources nor its packages change.

use crate::cpio::Archive;
use crate::scenario::Payload;
use crate::tree::Tree;
use crate::ui::Task;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which kernel, as a scenario names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kernel {
    /// 6.12, of Debian 13.
    #[default]
    Stable,
    /// The newest that Debian has.
    Newest,
}

impl Kernel {
    /// Debian's suite.
    fn suite(self) -> &'static str {
        match self {
            Self::Stable => "trixie",
            Self::Newest => "sid",
        }
    }

    /// How the names of its packages begin, before the version: those that hold the kernel itself.
    fn package(self) -> &'static str {
        match self {
            Self::Stable => "linux-image-6.12.",
            Self::Newest => "linux-binary-",
        }
    }

    /// Name of the file in the cache.
    fn file(self) -> &'static str {
        match self {
            Self::Stable => "kernel",
            Self::Newest => "kernel-newest",
        }
    }
}

/// The flavour, with which the names of the packages end.
const FLAVOUR: &str = "-cloud-arm64";
const BUSYBOX: &str = "busybox-static";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The first program, in the checkout.
const INIT: &str = "qemu/linux/init";

/// Gets what is missing of them in the cache.
///
/// # Errors
/// They cannot be had: there is no Debian, or no network. Nothing half done is left in the cache.
fn fetch(tree: &Tree, kernel: Kernel) -> Result<()> {
    let cache = cache_of(tree);
    if [cache.join(kernel.file()), cache.join("busybox")].iter().all(|file| file.is_file()) {
        return Ok(());
    }
    let (package, suite) = (kernel.package(), kernel.suite());
    let task = Task::begin(format!("fetching {package}x{FLAVOUR} and {BUSYBOX} of Debian {suite}"));
    download(&cache, kernel)?;
    task.done("fetched");
    Ok(())
}

/// Gets these kernels; returns those that cannot be had, and why.
pub(crate) fn missing(tree: &Tree, kernels: impl Iterator<Item = Kernel>) -> BTreeMap<Kernel, String> {
    let kernels: BTreeSet<Kernel> = kernels.collect();
    kernels
        .into_iter()
        .filter_map(|kernel| fetch(tree, kernel).err().map(|error| (kernel, format!("{error:#}"))))
        .collect()
}

/// The host with its ramdisk, which is written anew. At its end it turns the machine off, or does what else
/// `qemu/linux/init` knows by this name.
pub(crate) fn payload(tree: &Tree, kernel: Kernel, end: &str) -> Result<Payload> {
    fetch(tree, kernel).context("Linux cannot be had")?;
    let cache = cache_of(tree);
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys"] {
        archive.directory(folder);
    }
    archive.file("bin/busybox", &fs::read(cache.join("busybox"))?);
    archive.file("init", &fs::read(tree.root.join(INIT)).with_context(|| INIT.to_owned())?);
    let ramdisk = cache.join("ramdisk.cpio");
    fs::write(&ramdisk, archive.finish())?;
    let append = format!("console=ttyAMA0 quiet end={end}");
    Ok(Payload { host: cache.join(kernel.file()), ramdisk: Some(ramdisk), append })
}

/// Lets another tree have what is in the cache of this one.
pub(crate) fn share(from: &Tree, to: &Tree) -> Result<()> {
    let cache = cache_of(to);
    fs::create_dir_all(&cache)?;
    for entry in fs::read_dir(cache_of(from)).into_iter().flatten() {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), cache.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn cache_of(tree: &Tree) -> PathBuf {
    tree.target.join("linux")
}

/// Downloads the packages into the cache and takes the two files out of them.
fn download(cache: &Path, kernel: Kernel) -> Result<()> {
    let cache = std::path::absolute(cache)?;
    let work = cache.join("apt");
    // What an earlier try has left is of no use.
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    for folder in ["lists/partial", "archives/partial", "none", "unpacked"] {
        fs::create_dir_all(work.join(folder))?;
    }
    ensure!(Path::new(KEYRING).is_file(), "there is no {KEYRING}: the packages cannot be checked");
    let suite = kernel.suite();
    let source = format!("deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n");
    fs::write(work.join("sources.list"), source)?;
    fs::write(work.join("status"), "")?;
    fs::write(work.join("apt.conf"), configuration(&work))?;
    let apt = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", work.join("apt.conf")).args(arguments).current_dir(&work);
        output(command)
    };
    apt("apt-get", &["update", "-qq"])?;
    let names = apt("apt-cache", &["pkgnames", kernel.package()])?;
    let package = newest(&names, kernel).context("the archive has no such kernel")?;
    let packages = [package, BUSYBOX].map(|package| format!("{package}:arm64"));
    apt("apt-get", &["download", "-qq", &packages[0], &packages[1]])?;
    for entry in fs::read_dir(&work)? {
        let package = entry?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            let mut command = Command::new("dpkg");
            command.arg("-x").arg(package).arg(work.join("unpacked"));
            output(command)?;
        }
    }
    let unpacked = work.join("unpacked");
    // Moved and not copied: a file in the cache is whole.
    fs::rename(unpacked.join("usr/bin/busybox"), cache.join("busybox"))
        .context("no busybox in its package")?;
    let image = image_in(&unpacked).context("no kernel in its package")?;
    fs::rename(image, cache.join(kernel.file()))?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// A configuration of apt that looks at nothing of the system's.
fn configuration(work: &Path) -> String {
    let at = |name: &str| work.join(name).display().to_string();
    [
        format!("Dir::Etc::SourceList \"{}\";", at("sources.list")),
        format!("Dir::Etc::SourceParts \"{}\";", at("none")),
        "Dir::Etc::Preferences \"/dev/null\";".to_owned(),
        format!("Dir::Etc::PreferencesParts \"{}\";", at("none")),
        format!("Dir::State \"{}\";", work.display()),
        format!("Dir::State::status \"{}\";", at("status")),
        format!("Dir::Cache \"{}\";", work.display()),
        // Downloads are written by whoever runs this, and not by a user of apt's own.
        "APT::Sandbox::User \"\";".to_owned(),
        "Acquire::Retries \"2\";".to_owned(),
        "APT::Architecture \"arm64\";".to_owned(),
        "APT::Architectures { \"arm64\"; };\n".to_owned(),
    ]
    .join("\n")
}

/// The kernel's file, which newer packages have among its modules: `boot/vmlinuz-RELEASE`, or
/// `usr/lib/modules/RELEASE/vmlinuz`.
fn image_in(unpacked: &Path) -> Option<PathBuf> {
    let entries = |folder: &str| fs::read_dir(unpacked.join(folder)).into_iter().flatten().flatten();
    let in_boot = entries("boot").map(|entry| entry.path());
    let in_boot = in_boot
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    let with_modules = entries("usr/lib/modules").map(|entry| entry.path().join("vmlinuz"));
    in_boot.chain(with_modules).find(|path| path.is_file())
}

/// The package of the highest version among these names.
fn newest(names: &str, kernel: Kernel) -> Option<&str> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|byte: char| !byte.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
    };
    // What follows is a version, and not that of a release candidate.
    let fits = |name: &&str| {
        let version = name.strip_prefix(kernel.package()).and_then(|rest| rest.strip_suffix(FLAVOUR));
        version.is_some_and(|version| {
            version.starts_with(|first: char| first.is_ascii_digit()) && !version.contains("-rc")
        })
    };
    names.lines().filter(fits).max_by_key(|name| numbers(name))
}

/// Runs a program to its end; what it printed, or what it complained of.
fn output(mut command: Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("this system has no {program}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    let last = complaint.trim().lines().last().unwrap_or_default();
    ensure!(output.status.success(), "{program} failed ({}): {last}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_the_flavour_is_chosen_by_its_numbers() {
        let names = "linux-image-6.12.9+deb13-cloud-arm64\nlinux-image-6.12.117+deb13-cloud-arm64\n\
                     linux-image-6.12.117+deb13-cloud-arm64-dbg\nlinux-image-6.12.200+deb13-arm64\n\
                     linux-image-6.12.107+deb13-cloud-arm64\n";
        assert_eq!(newest(names, Kernel::Stable), Some("linux-image-6.12.117+deb13-cloud-arm64"));
        assert_eq!(newest("linux-image-6.12.9+deb13-cloud-arm64-unsigned", Kernel::Stable), None);
        let names = "linux-binary-7.1.9+deb14-cloud-arm64\nlinux-binary-7.2.3+deb14-cloud-arm64\n\
                     linux-binary-unsigned-7.2.3+deb14-cloud-arm64\nlinux-binary-7.3-rc1-cloud-arm64\nlinux-binary-7.2.4+deb14-arm64\n";
        assert_eq!(newest(names, Kernel::Newest), Some("linux-binary-7.2.3+deb14-cloud-arm64"));
    }

    #[test]
    fn apt_is_told_nothing_of_the_systems() {
        let text = configuration(Path::new("/there"));
        assert!(!text.contains("/etc") && !text.contains("/var"));
        assert_eq!(text.matches("\"/there").count(), 6);
        assert_eq!(text.lines().filter(|line| line.ends_with(';')).count(), 11);
    }

    #[test]
    fn a_program_that_fails_is_told_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo second >&2; exit 3"]);
        let error = format!("{:#}", output(command).unwrap_err());
        assert!(error.contains("sh failed") && error.ends_with("second"), "{error}");
        assert!(output(Command::new("no-such-program")).is_err());
    }
}
