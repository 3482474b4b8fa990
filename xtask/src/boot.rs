//! One run of QEMU: the command line, the process, and what it left behind.

use crate::aftermath::Aftermath;
use crate::console::{Console, Ending, Expectation};
use crate::devicetree;
use crate::elf;
use crate::emulator::Emulator;
use crate::entries;
use crate::follow::{Followed, Wish, end_of, follow, killed, read_in_background};
use crate::images::{Builder, Images};
use crate::linux;
use crate::oracle;
use crate::ram::RamFile;
use crate::report::Check;
use crate::scenario::{Machine, Scenario};
use crate::secret;
use crate::tree::Tree;
use crate::ui::command_line;
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Where QEMU puts an image that is given with `-kernel`: 2 MiB into RAM.
const IMAGE_ADDRESS: u64 = 0x4020_0000;
/// More console than this is a guest that prints without end.
const MAX_CONSOLE: usize = 32 << 20;
/// How long a boot goes on, at the most, once it has shown that something fails.
const AFTER_A_FAILURE: Duration = Duration::from_secs(5);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How to run. By default: quietly, as the scenario says, on the plain image, without its control run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Which QEMU.
    pub(crate) emulator: Emulator,
    /// Show the console while it is written.
    pub(crate) live: bool,
    /// A person types on the console. No timeout.
    pub(crate) typed: bool,
    /// Print command lines.
    pub(crate) verbose: bool,
    /// Wait for a debugger.
    pub(crate) gdb: bool,
    /// Boot the image that has the oracle, and count instructions.
    pub(crate) oracle: bool,
    /// Count instructions for time, so that a run repeats exactly.
    pub(crate) replay: bool,
    /// Run the control image too, where the scenario has one.
    pub(crate) control: bool,
    /// Seconds, instead of the scenario's.
    pub(crate) timeout: Option<u64>,
    /// All that is asked is whether something fails: once a step has, what hangs is not waited for.
    pub(crate) until_a_step_fails: bool,
    /// Name of the run and of its log.
    pub(crate) label: String,
    /// More options of QEMU.
    pub(crate) more: Vec<String>,
}

/// What a run showed.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) checks: Vec<Check>,
    /// What the console says.
    pub(crate) console: Console,
    /// The hypervisor's ELF file.
    pub(crate) hyp_elf: PathBuf,
    /// Without the time for building.
    pub(crate) duration: Duration,
    pub(crate) log: PathBuf,
}

impl Outcome {
    /// The outcome of a run that did not come about.
    pub(crate) fn could_not_be_made(tree: &Tree, options: &Options, error: &anyhow::Error) -> Self {
        let check = Check::new("run", "the run can be made", format!("{error:#}"), false);
        let log = log_of(tree, options);
        Self {
            checks: vec![check],
            console: Console::default(),
            hyp_elf: PathBuf::new(),
            duration: Duration::ZERO,
            log,
        }
    }

    /// Whether all checks passed.
    pub(crate) fn pass(&self) -> bool {
        self.failures().next().is_none()
    }

    /// The checks that failed.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.pass)
    }
}

/// One start of QEMU: everything that differs between a scenario's run and its control run.
struct Start<'a> {
    emulator: &'a Emulator,
    images: &'a Images,
    scenario: &'a Scenario,
    machine: &'a Machine,
    /// Given to the hypervisor only.
    nonce: u64,
    /// Given to the program, if RAM is searched.
    secret_nonce: Option<u64>,
    ram: Option<RamFile>,
    /// Without the hypervisor.
    alone: bool,
}

/// Builds the images and boots a scenario, then its control image where it has one.
pub(crate) fn scenario(
    tree: &Tree,
    builder: &Builder<'_>,
    scenario: &Scenario,
    machine: &Machine,
    options: &Options,
) -> Result<Outcome> {
    let mut features = scenario.features.clone();
    features.extend(options.oracle.then(|| oracle::FEATURE.to_owned()));
    let images = builder.images(&features)?;
    let test_calls = builder.has_test_calls();
    ensure!(
        test_calls || !scenario.test_calls,
        "{} needs test calls, which a release image has not",
        scenario.name
    );
    let mut scenario = scenario.clone();
    if let Some(end) = &scenario.linux {
        scenario.payload = Some(linux::payload(tree, scenario.kernel, end)?);
    }
    let scenario = &scenario;
    let mut began = Instant::now();
    let start = Start::new(tree, &options.emulator, &images, scenario, machine)?;
    let log = log_of(tree, options);
    // QEMU writes one log: here none is wanted yet.
    let exceptions =
        (scenario.linux.is_some() && options.more.is_empty()).then(|| log.with_extension("exceptions"));
    let mut with_log = options.clone();
    with_log.more.extend(exceptions.iter().flat_map(|log| entries::qemu_options(log)));
    let (console, ending) = start.run(tree, &with_log, &log)?;

    let steps = scenario.expected_steps(test_calls);
    let stop = scenario.stop.as_ref();
    let expectation = Expectation { nonce: start.nonce, steps: &steps, verdict: &scenario.verdict, stop };
    let mut checks = console.judge(&expectation, ending);
    let aftermath = start.aftermath(&console, ending);
    if scenario.search.is_some() {
        checks.push(aftermath.search(false));
    }
    if scenario.walk.is_some() {
        checks.push(aftermath.walk());
    }
    if let Some(exceptions) = exceptions {
        checks.push(entries::check(&std::fs::read_to_string(&exceptions)?, &console));
        std::fs::remove_file(exceptions)?;
    }
    if options.oracle && scenario.stop.is_none() {
        checks.push(oracle::check(&console, !scenario.parallel));
    }
    if scenario.alone {
        let alone = Start { alone: true, ..start };
        // What the caller wants to know is of the hypervisor.
        let options = Options { more: Vec::new(), ..options.clone() };
        let (without, ending) = alone.run(tree, &options, &log.with_extension("alone.log"))?;
        checks.push(cost_of_deed(&console, &without, ending));
    } else {
        drop(start);
    }
    let mut duration = began.elapsed();

    if let (Some(control), true) = (&scenario.control, options.control) {
        let features = [scenario.features.clone(), control.features.clone()].concat();
        let images = builder.images(&features)?;
        began = Instant::now();
        let mut scenario = scenario.clone();
        scenario.args.extend(control.args.iter().cloned());
        let start = Start::new(tree, &options.emulator, &images, &scenario, machine)?;
        let (console, ending) = start.run(tree, options, &log.with_extension("control.log"))?;
        let mut more = console.judge_end(start.nonce, &scenario.verdict, ending);
        more.push(start.aftermath(&console, ending).search(true));
        checks
            .extend(more.into_iter().map(|check| Check { name: format!("control-{}", check.name), ..check }));
        duration += began.elapsed();
    }
    Ok(Outcome { checks, console, hyp_elf: images.hyp_elf, duration, log })
}

/// In a hundred, what a host's boot may take more with Deed. The host waits for its own ticks now and then, so
/// that what comes a little later can cost a tick more, or less.
const MOST_MORE: u64 = 1;

/// Compares the only row of a host's boot with that of its boot without Deed.
fn cost_of_deed(with: &Console, without: &Console, ending: Ending) -> Check {
    let (observed, pass) = match (with.rows.as_slice(), without.rows.as_slice(), ending) {
        ([with], [without], Ending::Status(0)) => (
            format!("{} with Deed, {} without", with.min, without.min),
            with.min.saturating_mul(100) <= without.min.saturating_mul(100 + MOST_MORE),
        ),
        (with, without, _) => {
            (format!("{} rows with Deed, {} without, {ending:?}", with.len(), without.len()), false)
        }
    };
    let expected = format!("at most {MOST_MORE} % more than without Deed");
    Check::new("instructions", expected, observed, pass)
}

fn log_of(tree: &Tree, options: &Options) -> PathBuf {
    tree.results().join(format!("{}.log", options.label))
}

impl<'a> Start<'a> {
    fn new(
        tree: &Tree,
        emulator: &'a Emulator,
        images: &'a Images,
        scenario: &'a Scenario,
        machine: &'a Machine,
    ) -> Result<Self> {
        let known = &images.programs;
        ensure!(
            scenario.payload.is_some() || known.contains(&scenario.program),
            "scenario `{}`: the ramdisk has no program `{}` (it has: {})",
            scenario.name,
            scenario.program,
            known.join(", ")
        );
        let is_read = scenario.search.is_some() || scenario.walk.is_some();
        let ram = is_read.then(|| RamFile::create(&tree.results(), machine.memory_bytes()?)).transpose()?;
        let secret_nonce = scenario.search.is_some().then(secret::nonce).transpose()?;
        Ok(Self {
            emulator,
            images,
            scenario,
            machine,
            nonce: secret::nonce()?,
            secret_nonce,
            ram,
            alone: false,
        })
    }

    fn command(&self, gdb: bool, counts: bool) -> Command {
        let el2 = if self.alone { "off" } else { "on" };
        let mut board = format!("virt,virtualization={el2},gic-version=3,its=off,dtb-randomness=off");
        if self.machine.cpu == "max" {
            // With memory for tags. Without it QEMU hides what Deed is to hide.
            board += ",mte=on";
        }
        if self.scenario.smmu {
            board += ",iommu=smmuv3";
        }
        let mut command = self.emulator.command();
        if let Some(ram) = &self.ram {
            board += ",memory-backend=ram";
            let path = ram.path().to_string_lossy().replace(',', ",,");
            let size = &self.machine.memory;
            command
                .arg("-object")
                .arg(format!("memory-backend-file,id=ram,size={size},mem-path={path},share=on"));
        }
        // Without its own algorithm for pointer authentication, `max` spends its time in QARMA.
        let cpu = match self.machine.cpu.as_str() {
            "max" => "max,pauth-impdef=on",
            cpu => cpu,
        };
        let cpu = match self.scenario.counted {
            true => format!("{cpu},cntfrq=1000000000"),
            false => cpu.to_owned(),
        };
        if (counts && !self.scenario.parallel) || self.scenario.counted {
            // One nanosecond of virtual time an instruction, so that time tells instructions.
            command.args(["-icount", "shift=0,sleep=off,align=off"]);
            // The time of day must not make one run differ from the next either.
            command.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
        }
        command.args(["-machine", &board, "-cpu", &cpu, "-smp", &self.machine.smp.to_string()]);
        command.args(["-m", &self.machine.memory, "-nic", "none", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        if self.alone {
            self.load_host_alone(&mut command);
        } else {
            self.load_under_deed(&mut command);
        }
        if gdb {
            command.args(["-S", "-gdb", "tcp:localhost:1234"]);
        }
        command
    }

    /// The host, its ramdisk and its boot arguments.
    fn host(&self) -> (&std::path::Path, Option<&std::path::Path>, String) {
        match &self.scenario.payload {
            Some(payload) => (&payload.host, payload.ramdisk.as_deref(), payload.append.clone()),
            None => (&self.images.host, Some(&self.images.ramdisk), self.host_args()),
        }
    }

    fn load_under_deed(&self, command: &mut Command) {
        command.arg("-kernel").arg(&self.images.hyp);
        let append = format!("deed.nonce={:016x} {}", self.nonce, self.scenario.boot.append);
        command.arg("-append").arg(append.trim_end());
        let boot = &self.scenario.boot;
        let (kernel, initrd, args) = self.host();
        let text = |text: &str| text.replace(',', ",,");
        let (kernel, args) = (text(&kernel.to_string_lossy()), text(&args));
        let host = format!("guest-loader,addr={:#x},kernel={kernel},bootargs={args}", boot.host);
        command.args(["-device", &host]);
        if let Some(initrd) = initrd {
            let initrd = text(&initrd.to_string_lossy());
            command.args(["-device", &format!("guest-loader,addr={:#x},initrd={initrd}", boot.ramdisk)]);
        }
    }

    fn load_host_alone(&self, command: &mut Command) {
        let (kernel, initrd, args) = self.host();
        command.arg("-kernel").arg(kernel).args(["-append", &args]);
        if let Some(initrd) = initrd {
            command.arg("-initrd").arg(initrd);
        }
    }

    /// The host's boot arguments: its first program, and behind `--` that program's arguments.
    fn host_args(&self) -> String {
        let mut words = vec![format!("init=/bin/{}", self.scenario.program), "--".to_owned()];
        words.extend(self.scenario.args.iter().cloned());
        words.extend(self.secret_nonce.map(|nonce| format!("secret-nonce={nonce:016x}")));
        if words.len() == 2 {
            words.pop();
        }
        words.join(" ")
    }

    fn run(&self, tree: &Tree, options: &Options, log: &std::path::Path) -> Result<(Console, Ending)> {
        let mut command = self.command(options.gdb, options.oracle || options.replay);
        command.args(&options.more);
        if !self.scenario.tree.is_empty() {
            let file = tree.results().join(format!("{}.dtb", options.label));
            devicetree::write(self.command(false, false), &self.scenario.tree, &file, options.verbose)?;
            command.arg("-dtb").arg(file);
        }
        if options.verbose {
            eprintln!("{}", command_line(&command));
        }
        if options.gdb {
            self.say_how_to_attach()?;
        }
        let mut log =
            std::fs::File::create(log).with_context(|| format!("cannot write {}", tree.show(log)))?;
        let seconds = options.timeout.unwrap_or(self.scenario.timeout);
        let is_endless = (options.gdb || options.typed) && options.timeout.is_none();
        let limit = if is_endless { DAY } else { Duration::from_secs(seconds) };

        let (reader, writer) = std::io::pipe()?;
        let stdin = if options.typed { Stdio::inherit() } else { Stdio::null() };
        command.stdin(stdin).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("cannot start QEMU")?;
        drop(command);
        let chunks = read_in_background(reader);
        let mut console = Vec::new();
        let ended = follow(&chunks, Instant::now() + limit, |chunk| {
            if let Some(ram) = &self.ram {
                ram.unlink();
            }
            console.extend_from_slice(chunk);
            log.write_all(chunk)?;
            if options.live {
                std::io::stdout().write_all(chunk)?;
                std::io::stdout().flush()?;
            }
            let has_failed = || Console::parse(&String::from_utf8_lossy(&console)).has_failed_step();
            Ok(match console.len() < MAX_CONSOLE {
                true if options.until_a_step_fails && has_failed() => Wish::ForAnother(AFTER_A_FAILURE),
                true => Wish::GoOn,
                false => Wish::Enough,
            })
        });
        let ending = match ended {
            Ok(Followed::ToTheEnd) => end_of(&mut child, seconds)?,
            Ok(Followed::TooLong) => killed(&mut child, Ending::Timeout(limit.as_secs()))?,
            Ok(Followed::TooMuch) => killed(&mut child, Ending::Flood)?,
            Err(error) => {
                killed(&mut child, Ending::Signal)?;
                return Err(error);
            }
        };
        if options.live && !console.ends_with(b"\n") {
            println!();
        }
        Ok((Console::parse(&String::from_utf8_lossy(&console)), ending))
    }

    fn aftermath<'b>(&'b self, console: &'b Console, ending: Ending) -> Aftermath<'b> {
        Aftermath {
            ram: self.ram.as_ref(),
            machine: self.machine,
            hyp_elf: &self.images.hyp_elf,
            secret_nonce: self.secret_nonce,
            console,
            ending,
        }
    }

    fn say_how_to_attach(&self) -> Result<()> {
        let linked_at = elf::symbols(&std::fs::read(&self.images.hyp_elf)?)?.get("__image_start").copied();
        let moved = IMAGE_ADDRESS.wrapping_sub(linked_at.unwrap_or(0));
        eprintln!("QEMU waits for a debugger. In another terminal:");
        eprintln!(
            "  gdb-multiarch -ex 'set architecture aarch64' -ex 'target remote localhost:1234' \\\n    \
             -ex 'add-symbol-file {} -o {moved:#x}' -ex 'add-symbol-file {}'",
            self.images.hyp_elf.display(),
            self.images.host_elf.display(),
        );
        eprintln!("  (gdb) hbreak *{IMAGE_ADDRESS:#x}");
        eprintln!("  (gdb) continue");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Overrides;

    fn with_start(more: &str, secret_nonce: Option<u64>, test: impl FnOnce(&Start<'_>)) {
        let text = format!("description = \"d\"\nprogram = \"p\"\nsteps = [\"a\"]\n{more}");
        let scenario = Scenario::parse("s", &text).unwrap();
        let machine = scenario.machine(&Overrides::default());
        let path = |name: &str| PathBuf::from(name);
        let images = Images {
            hyp: path("hyp.img"),
            hyp_elf: path("hyp.elf"),
            host: path("a,b/host.img"),
            host_elf: path("host.elf"),
            ramdisk: path("ramdisk.cpio"),
            programs: vec!["p".into()],
        };
        let (images, scenario, machine) = (&images, &scenario, &machine);
        let emulator = &Emulator::default();
        test(&Start {
            emulator,
            images,
            scenario,
            machine,
            nonce: 0xab,
            secret_nonce,
            ram: None,
            alone: false,
        });
    }

    #[test]
    fn the_hosts_arguments_name_program_arguments_and_secret() {
        with_start("", None, |start| assert_eq!(start.host_args(), "init=/bin/p"));
        with_start("args = [\"a\", \"b=1\"]", Some(0xf), |start| {
            assert_eq!(start.host_args(), "init=/bin/p -- a b=1 secret-nonce=000000000000000f");
        });
    }

    #[test]
    fn the_runs_nonce_is_in_the_hypervisors_arguments_only_and_commas_are_doubled() {
        with_start("args = [\"x,y\"]\n[boot]\nappend = \"deed.x=1\"", None, |start| {
            let command = start.command(false, false);
            let args: Vec<String> =
                command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
            let with_nonce: Vec<_> = args.iter().filter(|arg| arg.contains("00ab")).collect();
            assert_eq!(with_nonce, ["deed.nonce=00000000000000ab deed.x=1"]);
            let host = "guest-loader,addr=0x42000000,kernel=a,,b/host.img,bootargs=init=/bin/p -- x,,y";
            assert!(args.contains(&host.to_owned()), "{args:?}");
        });
    }
}
