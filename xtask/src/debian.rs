//! Files out of packages of Debian's archive, under a state of apt's own: neither the system's list of sources nor its
//! packages change.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite of the archive, for one architecture. Its folder stays until [`Suite::remove`]; the next [`Suite::read`] empties
/// it.
#[derive(Debug)]
pub(crate) struct Suite {
    folder: PathBuf,
}

impl Suite {
    /// Empties `folder` and reads the suite's lists into it.
    ///
    /// # Errors
    /// There is no apt, no keyring of Debian's, or no network.
    pub(crate) fn read(folder: &Path, suite: &str, architecture: &str) -> Result<Self> {
        // What an earlier try has left is of no use.
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        let folder = std::path::absolute(folder)?;
        for part in ["lists/partial", "archives/partial", "none", "unpacked"] {
            fs::create_dir_all(folder.join(part))?;
        }
        ensure!(Path::new(KEYRING).is_file(), "there is no {KEYRING}: the packages cannot be checked");
        let source = format!("deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n");
        fs::write(folder.join("sources.list"), source)?;
        fs::write(folder.join("status"), "")?;
        fs::write(folder.join("apt.conf"), configuration(&folder, architecture))?;
        let suite = Self { folder };
        suite.apt("apt-get", &["update", "-qq"])?;
        Ok(suite)
    }

    /// Names of packages that begin so, one a line.
    pub(crate) fn names(&self, start: &str) -> Result<String> {
        self.apt("apt-cache", &["pkgnames", start])
    }

    /// Downloads packages and unpacks them, without what they depend on. Returns the folder.
    pub(crate) fn unpack(&self, packages: &[&str]) -> Result<PathBuf> {
        self.apt("apt-get", &[&["download", "-qq"], packages].concat())?;
        self.unpack_all(&self.folder)
    }

    /// Downloads a package and all that it needs to run, and unpacks them. Returns the folder.
    pub(crate) fn unpack_whole(&self, package: &str) -> Result<PathBuf> {
        // The state knows of no package that is installed, so not even the C library is left out.
        let options = ["install", "-qq", "-y", "--no-install-recommends", "--download-only"];
        self.apt("apt-get", &[&options, [package].as_slice()].concat())?;
        self.unpack_all(&self.folder.join("archives"))
    }

    /// Takes the folder away.
    pub(crate) fn remove(self) -> Result<()> {
        fs::remove_dir_all(self.folder).context("cannot remove apt's state")
    }

    fn unpack_all(&self, from: &Path) -> Result<PathBuf> {
        let to = self.folder.join("unpacked");
        for entry in fs::read_dir(from)? {
            let package = entry?.path();
            if package.extension().is_some_and(|extension| extension == "deb") {
                let mut command = Command::new("dpkg");
                command.arg("-x").arg(package).arg(&to);
                output(command)?;
            }
        }
        Ok(to)
    }

    fn apt(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).args(arguments).current_dir(&self.folder);
        output(command)
    }
}

/// The build machine's architecture, as Debian calls it.
pub(crate) fn architecture() -> Result<String> {
    let mut command = Command::new("dpkg");
    command.arg("--print-architecture");
    output(command).map(|name| name.trim().to_owned())
}

/// A configuration of apt that looks at nothing of the system's.
fn configuration(work: &Path, architecture: &str) -> String {
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
        format!("APT::Architecture \"{architecture}\";"),
        format!("APT::Architectures {{ \"{architecture}\"; }};\n"),
    ]
    .join("\n")
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
    fn apt_is_told_nothing_of_the_systems() {
        let text = configuration(Path::new("/there"), "arm64");
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
