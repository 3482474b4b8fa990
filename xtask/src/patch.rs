//! Seeded faults: patch files of `tests/faults`, and the header that says who must catch them.
//! `tests/faults/README.md` describes the form.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// Which tests are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Layer {
    /// Tests that run on the build machine.
    Unit,
    /// Pairs of calls there, under schedules of several CPUs.
    Threads,
    /// Boots in QEMU.
    Emulator,
    /// Boots in QEMU with the oracle.
    Oracle,
}

impl Layer {
    /// Whether its tests need an emulator.
    pub(crate) fn boots(self) -> bool {
        matches!(self, Self::Emulator | Self::Oracle)
    }
}

/// Who must catch a fault.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Catcher {
    /// Tests of a package whose names contain `test`.
    Unit { package: String, test: String },
    /// Tests of `tests/tests/threads.rs` whose names contain `test`.
    Threads { test: String },
    /// A scenario, or one step of it.
    Emulator { scenario: String, step: Option<String> },
    /// The oracle, in a boot of a scenario.
    Oracle { scenario: String },
}

/// A seeded fault.
#[derive(Clone, Debug)]
pub(crate) struct Patch {
    /// File name without `.patch`.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// What is wrong, in one line.
    pub(crate) fault: String,
    pub(crate) layer: Layer,
    pub(crate) catchers: Vec<Catcher>,
    /// Files that it changes, from the root of the checkout.
    files: Vec<String>,
}

impl Patch {
    /// Reads all patches of a folder, in alphabetical order.
    pub(crate) fn load_all(folder: &Path) -> Result<Vec<Self>> {
        let mut patches = Vec::new();
        for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "patch") {
                let text = std::fs::read_to_string(&path)?;
                let patch = Self::parse(path.clone(), &text);
                patches.push(patch.with_context(|| format!("{}", path.display()))?);
            }
        }
        patches.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(patches)
    }

    fn parse(path: PathBuf, text: &str) -> Result<Self> {
        let (mut fault, mut layer, mut catchers) = (None, None, Vec::new());
        for line in text.lines().map_while(|line| line.strip_prefix('#')) {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match key.trim() {
                "fault" => fault = Some(value.to_owned()),
                "layer" => {
                    layer = match value {
                        "unit" => Some(Layer::Unit),
                        "threads" => Some(Layer::Threads),
                        "emulator" => Some(Layer::Emulator),
                        "oracle" => Some(Layer::Oracle),
                        other => {
                            bail!("layer `{other}` is none of `unit`, `threads`, `emulator`, `oracle`")
                        }
                    }
                }
                "caught-by" => catchers.extend(value.split(',').map(|name| name.trim().to_owned())),
                _ => {}
            }
        }
        let layer = layer.context("no `# layer:` line")?;
        ensure!(!catchers.is_empty(), "no `# caught-by:` line");
        ensure!(text.lines().any(|line| line.starts_with("@@ ")), "no change in the patch");
        let files = text.lines().filter_map(|line| line.strip_prefix("+++ b/")).map(str::to_owned);
        let files: Vec<_> = files.collect();
        ensure!(!files.is_empty(), "no file in the patch");
        Ok(Self {
            name: path.file_stem().context("no name")?.to_string_lossy().into_owned(),
            fault: fault.filter(|fault| !fault.is_empty()).context("no `# fault:` line")?,
            layer,
            catchers: catchers.iter().map(|name| Catcher::parse(layer, name)).collect::<Result<_>>()?,
            files,
            path,
        })
    }

    /// Whether all that it changes is built for the bare machine alone, so that no layer but boots can see it.
    pub(crate) fn is_for_boots_alone(&self) -> bool {
        // Values alone, which the tests of `hyp` include.
        const BUILT_FOR_TESTS: &str = "hyp/src/arch/traps.rs";
        const BARE: [&str; 2] = ["hyp/src/arch/", "host-stub/src/arch/"];
        let is_bare =
            |file: &String| file != BUILT_FOR_TESTS && BARE.iter().any(|folder| file.starts_with(folder));
        self.files.iter().all(is_bare)
    }
}

impl Catcher {
    fn parse(layer: Layer, name: &str) -> Result<Self> {
        ensure!(!name.is_empty() && !name.contains(' '), "`caught-by: {name}` names no test");
        Ok(match layer {
            Layer::Unit => {
                let (package, test) =
                    name.split_once("::").with_context(|| format!("`{name}` is not PACKAGE::TEST"))?;
                Self::Unit { package: package.to_owned(), test: test.to_owned() }
            }
            Layer::Threads => Self::Threads { test: name.to_owned() },
            Layer::Emulator => {
                let (scenario, step) = match name.split_once('/') {
                    Some((scenario, step)) => (scenario, Some(step.to_owned())),
                    None => (name, None),
                };
                Self::Emulator { scenario: scenario.to_owned(), step }
            }
            Layer::Oracle => Self::Oracle { scenario: name.to_owned() },
        })
    }
}

impl std::fmt::Display for Catcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unit { package, test } => write!(f, "unit/{package}::{test}"),
            Self::Threads { test } => write!(f, "threads/{test}"),
            Self::Emulator { scenario, step: None } => write!(f, "emulator/{scenario}"),
            Self::Emulator { scenario, step: Some(step) } => write!(f, "emulator/{scenario}/{step}"),
            Self::Oracle { scenario } => write!(f, "oracle/{scenario}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(header: &str) -> Result<Patch> {
        Patch::parse(
            "no-wipe.patch".into(),
            &format!("{header}\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-# a\n+# b\n"),
        )
    }

    #[test]
    fn a_header_is_read() {
        let patch =
            parse("# fault: nothing: is wiped\n# layer: unit\n# caught-by: hyp::vm::a, deed-tests::b\n")
                .unwrap();
        assert_eq!((patch.name.as_str(), patch.fault.as_str()), ("no-wipe", "nothing: is wiped"));
        let names: Vec<String> = patch.catchers.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["unit/hyp::vm::a", "unit/deed-tests::b"]);
    }

    #[test]
    fn an_emulator_fault_names_a_scenario_and_maybe_a_step() {
        let patch =
            parse("# fault: f\n# layer: emulator\n# caught-by: default/search\n# caught-by: reset").unwrap();
        let step = Some("search".to_owned());
        assert_eq!(patch.catchers[0], Catcher::Emulator { scenario: "default".into(), step });
        assert_eq!(patch.catchers[1], Catcher::Emulator { scenario: "reset".into(), step: None });
    }

    #[test]
    fn a_fault_of_schedules_names_tests_of_one_file() {
        let patch = parse("# fault: f\n# layer: threads\n# caught-by: a_private_page").unwrap();
        assert_eq!(patch.catchers[0], Catcher::Threads { test: "a_private_page".into() });
        assert_eq!(patch.catchers[0].to_string(), "threads/a_private_page");
    }

    #[test]
    fn what_the_build_machine_builds_other_layers_could_see() {
        let is_for_boots = |files: &[&str]| {
            let changes: String = files
                .iter()
                .map(|file| format!("--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-a\n+b\n"))
                .collect();
            let header = "# fault: f\n# layer: emulator\n# caught-by: reset\n";
            Patch::parse("p.patch".into(), &(header.to_owned() + &changes)).unwrap().is_for_boots_alone()
        };
        assert!(is_for_boots(&["hyp/src/arch/world_switch.S", "host-stub/src/arch/smp.rs"]));
        assert!(!is_for_boots(&["hyp/src/arch/traps.rs"]));
        assert!(!is_for_boots(&["hyp/src/arch/el2.rs", "hyp/src/vm/run.rs"]));
    }

    #[test]
    fn the_tests_of_the_hypervisor_build_one_file_of_arch() {
        let tree = crate::tree::Tree::of_this_checkout().unwrap();
        let root = std::fs::read_to_string(tree.root.join("hyp/src/lib.rs")).unwrap();
        let built: Vec<&str> = root.lines().filter(|line| line.starts_with("#[path = ")).collect();
        assert_eq!(built, [r#"#[path = "arch/traps.rs"]"#]);
    }

    #[test]
    fn an_incomplete_header_is_refused() {
        for bad in [
            "",
            "# fault: f\n# layer: unit",
            "# layer: unit\n# caught-by: hyp::a",
            "# fault:\n# layer: unit\n# caught-by: hyp::a",
            "# fault: f\n# caught-by: hyp::a",
            "# fault: f\n# layer: moon\n# caught-by: hyp::a",
            "# fault: f\n# layer: unit\n# caught-by: hyp",
            "# fault: f\n# layer: unit\n# caught-by:",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(Patch::parse("p.patch".into(), "# fault: f\n# layer: unit\n# caught-by: hyp::a\n").is_err());
    }

    #[test]
    fn every_committed_patch_has_a_good_header() {
        let tree = crate::tree::Tree::of_this_checkout().unwrap();
        Patch::load_all(&tree.root.join("tests/faults")).unwrap();
    }
}
