//! Debian's Linux kernels as the host: fetched once into a cache, with a static busybox, and started with the first
//! program of `qemu/linux/init`.

use crate::cpio::Archive;
use crate::debian::Suite;
use crate::scenario::Payload;
use crate::tree::Tree;
use crate::ui::Task;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

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
    let suite = Suite::read(&cache.join("apt"), kernel.suite(), "arm64")?;
    let names = suite.names(kernel.package())?;
    let package = newest(&names, kernel).context("the archive has no such kernel")?;
    let packages = [package, BUSYBOX].map(|package| format!("{package}:arm64"));
    let unpacked = suite.unpack(&packages.each_ref().map(String::as_str))?;
    // Moved and not copied: a file in the cache is whole.
    fs::rename(unpacked.join("usr/bin/busybox"), cache.join("busybox"))
        .context("no busybox in its package")?;
    let image = image_in(&unpacked).context("no kernel in its package")?;
    fs::rename(image, cache.join(kernel.file()))?;
    suite.remove()
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
}
