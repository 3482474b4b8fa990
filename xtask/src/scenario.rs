//! The files of `qemu/scenarios`: one boot each. `qemu/README.md` says what every key means.

use crate::devicetree::Edit;
use crate::linux::Kernel;
use crate::tree::Tree;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Where the files are that every test run boots.
const SCENARIOS: &str = "qemu/scenarios";

/// One boot: what runs, and what must be seen.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// File name without `.toml`.
    #[serde(skip)]
    pub(crate) name: String,
    /// A host of the caller's own, instead of Deed's with a program.
    #[serde(skip)]
    pub(crate) payload: Option<Payload>,
    pub(crate) description: String,
    pub(crate) program: String,
    #[serde(default)]
    pub(crate) args: Vec<String>,
    /// The host is Debian's Linux, and this is what it does at its end (`end=` of `qemu/linux/init`).
    pub(crate) linux: Option<String>,
    /// Which of Debian's kernels.
    #[serde(default)]
    pub(crate) kernel: Kernel,
    #[serde(default = "default_timeout")]
    pub(crate) timeout: u64,
    memory: Option<String>,
    cpu: Option<String>,
    smp: Option<u32>,
    #[serde(default)]
    pub(crate) features: Vec<String>,
    /// The host is booted once more without Deed, and must not take many more instructions with it.
    #[serde(default)]
    pub(crate) alone: bool,
    /// The counter advances by one for each instruction.
    #[serde(default)]
    pub(crate) counted: bool,
    /// What it shows needs CPUs that run at the same time: no instruction is counted, not even with the oracle.
    #[serde(default)]
    pub(crate) parallel: bool,
    #[serde(default)]
    steps: Vec<String>,
    #[serde(default)]
    test_steps: Vec<String>,
    #[serde(default)]
    pub(crate) also: Vec<Overrides>,
    /// The machine has an SMMU.
    #[serde(default)]
    pub(crate) smmu: bool,
    /// The grid of machines of `--matrix` that it is part of.
    pub(crate) matrix: Option<Matrix>,
    /// It needs test calls, so no release image can show it.
    #[serde(default)]
    pub(crate) test_calls: bool,
    /// `cargo xtask test` boots it with the oracle too.
    #[serde(default)]
    pub(crate) oracle: bool,
    #[serde(default)]
    pub(crate) verdict: BTreeMap<String, toml::Value>,
    pub(crate) stop: Option<Stop>,
    #[serde(default)]
    pub(crate) boot: Boot,
    /// What differs of the device tree that QEMU makes.
    #[serde(default)]
    pub(crate) tree: Vec<Edit>,
    pub(crate) search: Option<Search>,
    pub(crate) control: Option<Control>,
    pub(crate) walk: Option<Walk>,
}

/// A host that is not Deed's own: any image that boots as an arm64 Linux kernel does.
#[derive(Clone, Debug)]
pub(crate) struct Payload {
    pub(crate) host: PathBuf,
    pub(crate) ramdisk: Option<PathBuf>,
    /// Its boot arguments.
    pub(crate) append: String,
}

/// What of the machine is given by hand.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Overrides {
    pub(crate) memory: Option<String>,
    pub(crate) cpu: Option<String>,
    pub(crate) smp: Option<u32>,
}

/// What the machines of a grid differ in, beside the CPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Matrix {
    /// The size of RAM.
    Memory,
    /// The number of CPUs.
    Cpus,
}

/// A boot that must end without a verdict: before the host runs, or because the hypervisor is broken.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stop {
    pub(crate) message: String,
    /// What else must be seen of the hypervisor, each in a line of its own.
    #[serde(default)]
    pub(crate) also: Vec<String>,
}

/// Where things are loaded, and Deed's own arguments.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Boot {
    pub(crate) host: u64,
    pub(crate) ramdisk: u64,
    pub(crate) append: String,
}

impl Default for Boot {
    fn default() -> Self {
        Self { host: 0x4200_0000, ramdisk: 0x4810_0000, append: String::new() }
    }
}

/// The secret must not be left in RAM.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Search {}

/// A second boot that shows that the search can find something.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    pub(crate) features: Vec<String>,
    /// More arguments of the program.
    #[serde(default)]
    pub(crate) args: Vec<String>,
}

/// The host's stage-2 must not reach the hypervisor.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Walk {}

fn default_timeout() -> u64 {
    60
}

/// The machine that QEMU plays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// As QEMU writes it: `512M`, `16G`.
    pub(crate) memory: String,
    pub(crate) cpu: String,
    pub(crate) smp: u32,
}

impl Machine {
    /// Size of RAM in bytes.
    pub(crate) fn memory_bytes(&self) -> Result<u64> {
        let (digits, shift) = match self.memory.as_bytes() {
            [digits @ .., b'G' | b'g'] => (digits, 30),
            [digits @ .., b'M' | b'm'] => (digits, 20),
            digits => (digits, 20),
        };
        let number: Option<u64> = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
        let bytes = number.and_then(|number| number.checked_mul(1 << shift)).filter(|bytes| *bytes > 0);
        bytes.with_context(|| format!("`{}` is no memory size: write 512M or 4G", self.memory))
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.memory, self.cpu, self.smp)
    }
}

impl Scenario {
    /// Reads `qemu/scenarios/NAME.toml`.
    pub(crate) fn load(tree: &Tree, name: &str) -> Result<Self> {
        Self::load_from(tree, SCENARIOS, name)
    }

    /// Reads `FOLDER/NAME.toml`.
    pub(crate) fn load_from(tree: &Tree, folder: &str, name: &str) -> Result<Self> {
        let path = tree.root.join(folder).join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&path).with_context(|| {
            let known = Self::names_in(tree, folder).unwrap_or_default().join(", ");
            format!("there is no scenario `{name}` (known: {known})")
        })?;
        Self::parse(name, &text).with_context(|| format!("{}", tree.show(&path)))
    }

    /// Whether it keeps more than one CPU of the build machine busy.
    pub(crate) fn is_busy(&self) -> bool {
        self.parallel || self.linux.is_some()
    }

    /// The boot of another host, of which nothing is known but that it must end with the hypervisor's verdict.
    pub(crate) fn of_payload(payload: Payload) -> Self {
        let text = "description = \"a host of the caller's own\"\nprogram = \"\"";
        let blank: Self = toml::from_str(text).unwrap_or_else(|error| panic!("a fixed text is bad: {error}"));
        Self { name: "payload".to_owned(), payload: Some(payload), ..blank }
    }

    /// The boot of a guest of the caller's own, which [`Builder::with_guest`](crate::images::Builder::with_guest) has put
    /// into the ramdisk.
    pub(crate) fn of_guest() -> Self {
        let text = "description = \"a guest of the caller's own\"\nprogram = \"guests\"\nargs = [\"own\"]";
        let blank: Self = toml::from_str(text).unwrap_or_else(|error| panic!("a fixed text is bad: {error}"));
        Self { name: "guest".to_owned(), ..blank }
    }

    /// Returns the names of all scenarios, in alphabetical order.
    pub(crate) fn names(tree: &Tree) -> Result<Vec<String>> {
        Self::names_in(tree, SCENARIOS)
    }

    /// Returns the names of the files in a folder, in alphabetical order.
    pub(crate) fn names_in(tree: &Tree, folder: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(tree.root.join(folder))? {
            let path = entry?.path();
            if let (Some(name), Some("toml")) = (path.file_stem(), path.extension().and_then(|e| e.to_str()))
            {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads the text of a scenario file.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Self> {
        let scenario = Self { name: name.to_owned(), ..toml::from_str(text)? };
        ensure!(!scenario.description.trim().is_empty(), "the description is empty");
        ensure!(scenario.timeout > 0, "the timeout is 0");
        ensure!(
            !(scenario.counted && scenario.parallel),
            "where instructions are counted, one CPU runs at a time"
        );
        ensure!(
            !scenario.alone || (scenario.counted && scenario.linux.is_some()),
            "only Linux runs without Deed, and only counted instructions can be compared"
        );
        if scenario.control.is_some() && scenario.search.is_none() {
            bail!("[control] without [search] shows nothing");
        }
        let has_steps = !(scenario.steps.is_empty() && scenario.test_steps.is_empty());
        match (&scenario.stop, has_steps) {
            (Some(_), true) => bail!("a boot that stops has no steps"),
            (None, false) => bail!("without steps a boot shows nothing"),
            _ => {}
        }
        let all: Vec<&String> = scenario.steps.iter().chain(&scenario.test_steps).collect();
        for (index, step) in all.iter().enumerate() {
            ensure!(!all[..index].contains(step), "step `{step}` is listed twice");
        }
        Ok(scenario)
    }

    /// The machine to run on: what was given by hand, else what the file says, else the default.
    pub(crate) fn machine(&self, by_hand: &Overrides) -> Machine {
        let text = |first: &Option<String>, second: &Option<String>, default: &str| {
            first.clone().or_else(|| second.clone()).unwrap_or_else(|| default.to_owned())
        };
        Machine {
            memory: text(&by_hand.memory, &self.memory, "1G"),
            cpu: text(&by_hand.cpu, &self.cpu, "cortex-a76"),
            smp: by_hand.smp.or(self.smp).unwrap_or(2),
        }
    }

    /// The kernel of Debian's that it needs.
    pub(crate) fn needed_kernel(&self) -> Option<Kernel> {
        self.linux.as_ref().map(|_| self.kernel)
    }

    /// The steps that must be seen, each list in its order. Those that need the test calls are expected only
    /// where the image has them.
    pub(crate) fn expected_steps(&self, test_calls: bool) -> [Vec<&str>; 2] {
        let more = if test_calls { self.test_steps.as_slice() } else { &[] };
        [&self.steps, more].map(|steps| steps.iter().map(String::as_str).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "description = \"d\"\nprogram = \"p\"\n";

    fn parse(more: &str) -> Result<Scenario> {
        let steps = if more.contains("steps") || more.contains("[stop]") { "" } else { "steps = [\"a\"]\n" };
        Scenario::parse("n", &format!("{MINIMAL}{steps}{more}"))
    }

    #[test]
    fn a_minimal_file_gets_the_documented_defaults() {
        let scenario = parse("").unwrap();
        let machine = scenario.machine(&Overrides::default());
        assert_eq!(machine, Machine { memory: "1G".into(), cpu: "cortex-a76".into(), smp: 2 });
        assert_eq!(
            (scenario.timeout, scenario.boot.host, scenario.boot.ramdisk),
            (60, 0x4200_0000, 0x4810_0000)
        );
        assert!(scenario.search.is_none() && scenario.walk.is_none() && scenario.stop.is_none());
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let scenario = parse("memory = \"4G\"\nsmp = 1").unwrap();
        let by_hand = Overrides { memory: Some("16G".into()), ..Overrides::default() };
        assert_eq!(scenario.machine(&by_hand).memory, "16G");
        assert_eq!(scenario.machine(&by_hand).smp, 1);
    }

    #[test]
    fn steps_that_need_test_calls_are_not_expected_without_them() {
        let scenario = parse("steps = [\"a\"]\ntest_steps = [\"b\"]").unwrap();
        assert_eq!(scenario.expected_steps(true), [["a"], ["b"]]);
        assert_eq!(scenario.expected_steps(false), [vec!["a"], vec![]]);
    }

    #[test]
    fn mistakes_in_a_file_are_refused() {
        for bad in [
            "step = [\"a\"]",
            "steps = [\"a\", \"a\"]",
            "steps = [\"a\"]\ntest_steps = [\"a\"]",
            "timeout = 0",
            "counted = true\nparallel = true",
            "counted = true\nalone = true",
            "[control]\nfeatures = []",
            "steps = []",
            "steps = [\"a\"]\n[stop]\nmessage = \"m\"",
            "[walk]\nroot = 1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(Scenario::parse("n", "program = \"p\"").is_err());
    }

    #[test]
    fn memory_sizes_are_read_as_qemu_reads_them() {
        let bytes =
            |memory: &str| Machine { memory: memory.into(), cpu: String::new(), smp: 1 }.memory_bytes();
        assert_eq!(bytes("513M").unwrap(), 513 << 20);
        assert_eq!(bytes("16G").unwrap(), 16 << 30);
        assert_eq!(bytes("128").unwrap(), 128 << 20);
        for bad in ["", "G", "0M", "1T", "-1G", "99999999999999G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_committed_scenario_can_be_read() {
        let tree = Tree::of_this_checkout().unwrap();
        for name in Scenario::names(&tree).unwrap() {
            let scenario = Scenario::load(&tree, &name).unwrap();
            for machine in scenario.also.iter().map(|also| scenario.machine(also)) {
                machine.memory_bytes().unwrap();
            }
        }
    }
}
