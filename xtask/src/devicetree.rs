//! A machine whose device tree is another than QEMU's: QEMU's own tree, boot modules included, altered by `fdtput`.

use crate::ui::command_line;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::path::Path;
use std::process::{Command, Stdio};

/// Of Debian's package `device-tree-compiler`.
pub(crate) const FDTPUT: &str = "fdtput";

/// One change of a device tree. Without a value the property is deleted, without a property the node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Edit {
    /// Path of the node, which is made if it is not there.
    node: String,
    property: Option<String>,
    text: Option<Vec<String>>,
    cells: Option<Vec<u32>>,
    bytes: Option<Vec<u8>>,
}

impl Edit {
    /// The arguments of `fdtput`.
    fn arguments(&self, file: &str) -> Result<Vec<String>> {
        let words = |options: &[&str], values: Vec<String>| {
            let options = options.iter().map(|option| (*option).to_owned());
            let place = [file.to_owned(), self.node.clone()].into_iter().chain(self.property.clone());
            options.chain(place).chain(values).collect()
        };
        Ok(match (&self.property, &self.text, &self.cells, &self.bytes) {
            (None, None, None, None) => words(&["-r"], Vec::new()),
            (Some(_), None, None, None) => words(&["-d"], Vec::new()),
            (Some(_), Some(text), None, None) => words(&["-p", "-t", "s"], text.clone()),
            (Some(_), None, Some(cells), None) => {
                words(&["-p", "-t", "u"], cells.iter().map(u32::to_string).collect())
            }
            (Some(_), None, None, Some(bytes)) => {
                words(&["-p", "-t", "bu"], bytes.iter().map(u8::to_string).collect())
            }
            _ => bail!("an edit of {} has more than one value, or a value without a property", self.node),
        })
    }
}

/// Writes the device tree of the machine that `qemu` plays to `file`, and alters it.
pub(crate) fn write(mut qemu: Command, edits: &[Edit], file: &Path, verbose: bool) -> Result<()> {
    let name = file.to_str().context("a path that is no text")?;
    qemu.arg("-machine").arg(format!("dumpdtb={}", name.replace(',', ",,")));
    quietly(qemu, verbose)?;
    for edit in edits {
        let mut command = Command::new(FDTPUT);
        command.args(edit.arguments(name)?);
        quietly(command, verbose)?;
    }
    Ok(())
}

fn quietly(mut command: Command, verbose: bool) -> Result<()> {
    if verbose {
        eprintln!("{}", command_line(&command));
    }
    let output = command.stdin(Stdio::null()).output().with_context(|| {
        format!("cannot start {} (`cargo xtask setup` installs it)", command.get_program().display())
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed: {said}", command_line(&command));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> Result<String> {
        let edit: Edit = toml::from_str(text)?;
        Ok(edit.arguments("f")?.join(" "))
    }

    #[test]
    fn an_edit_is_one_call_of_fdtput() {
        assert_eq!(arguments("node = \"/timer\"").unwrap(), "-r f /timer");
        let property = "node = \"/a\"\nproperty = \"reg\"\n";
        assert_eq!(arguments(property).unwrap(), "-d f /a reg");
        assert_eq!(arguments(&format!("{property}cells = [0, 4096]")).unwrap(), "-p -t u f /a reg 0 4096");
        assert_eq!(arguments(&format!("{property}text = [\"a\", \"b\"]")).unwrap(), "-p -t s f /a reg a b");
        assert_eq!(arguments(&format!("{property}bytes = [255]")).unwrap(), "-p -t bu f /a reg 255");
        assert!(arguments(&format!("{property}bytes = [255]\ncells = [1]")).is_err());
        assert!(arguments("node = \"/a\"\ncells = [1]").is_err());
    }
}
