//! Instructions of the EL2 image, as the boots of `qemu/scenarios` run them.
//!
//! QEMU translates code in blocks, each when it is first about to be run, and tells the instructions of each
//! (`-d in_asm`). A block ends at a branch and at whatever may change the rules of translation, so one that begins is run
//! to its end, unless an instruction in it aborts. The image runs where its ELF file says.

use super::{Args, flow};
use crate::boot::{self, Options};
use crate::elf;
use crate::images::Builder;
use crate::report::{Check, Covered, Environment};
use crate::scenario::Scenario;
use crate::toolchain::{Need, Toolchain};
use crate::tree::Tree;
use crate::ui::Task;
use crate::verbs::test::{boots_of, leave_out_missing_hosts};
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const TARGET: u64 = 85;
/// What the row of instructions that do not count is called.
const TO_PANIC: &str = "instructions that lead to a panic only";
/// Words that fill the vectors and the gaps between sections, and what the linker has shortened: NOP and UDF #0.
const FILL: [u32; 2] = [0xd503_201f, 0];

/// Code of an image.
#[derive(Debug, Default, PartialEq, Eq)]
struct Text {
    /// The address of each instruction.
    instructions: BTreeSet<u64>,
    /// Those of them that only fill a place: they count neither way.
    fill: BTreeSet<u64>,
    /// Those of them that lead to a panic only: they count neither way.
    panics: BTreeSet<u64>,
    /// Where functions begin.
    functions: BTreeMap<u64, String>,
}

/// Boots every scenario; returns whether they passed, and what they ran: the total, which has a target, and each function.
pub(super) fn measure(
    tree: &Tree,
    args: &Args,
    environment: &mut Environment,
) -> Result<(Vec<Check>, Vec<Covered>)> {
    let toolchain = Toolchain::ensure(&Need::BOOTS)?;
    toolchain.note_versions(environment);
    let builder = Builder::new(tree, &toolchain, false, args.verbose);
    let text = Text::of(&fs::read(builder.images(&[])?.hyp_elf)?)?;
    let log = tree.results().join("blocks.log");
    let more = text.qemu_options(&log)?;
    let mut run = BTreeSet::new();
    let mut checks = Vec::new();
    let mut boots = Vec::new();
    for name in Scenario::names(tree)? {
        boots.extend(boots_of(Scenario::load(tree, &name)?, false, false));
    }
    leave_out_missing_hosts(tree, &mut boots);
    // Other features are another image.
    for boot in boots.into_iter().filter(|boot| !boot.oracle && boot.scenario.features.is_empty()) {
        let task = Task::begin(&boot.label);
        let options = Options {
            verbose: args.verbose,
            label: format!("coverage-{}", boot.label),
            more: more.clone(),
            ..Options::default()
        };
        let machine = boot.scenario.machine(&boot.by_hand);
        let outcome = boot::scenario(tree, &builder, &boot.scenario, &machine, &options)?;
        let before = run.len();
        run.extend(addresses(&fs::read_to_string(&log).context("QEMU wrote no log")?)?);
        task.done(&format!("{} instructions that none ran before", run.len() - before));
        let named = |check: Check| Check { name: format!("{}/{}", boot.label, check.name), ..check };
        checks.extend(outcome.checks.into_iter().map(named));
    }
    fs::remove_file(&log)?;
    Ok((checks, text.rows(&run)?))
}

impl Text {
    fn of(elf: &[u8]) -> Result<Self> {
        let end = elf::symbols(elf)?.get("__text_used").copied().context("the image has no __text_used")?;
        let elf::Section { address, content, symbols } = elf::section(elf, ".text")?;
        let mut text = Self::from_symbols(symbols, end);
        let (words, _) = content.as_chunks::<4>();
        let fill = words
            .iter()
            .zip((address..).step_by(4))
            .filter(|(word, _)| FILL.contains(&u32::from_le_bytes(**word)));
        text.fill = fill.map(|(_, address)| address).collect();
        let code = words.iter().zip((address..).step_by(4)).map(|(word, at)| (at, u32::from_le_bytes(*word)));
        let code = code.filter(|(at, _)| text.instructions.contains(at)).collect();
        text.panics = &flow::leads_to_panic(&code, &text.functions) - &text.fill;
        Ok(text)
    }

    /// Code begins at a symbol `$x` and data in it at `$d` (Arm ELF for AArch64, 5.5.6, mapping symbols).
    fn from_symbols(mut symbols: Vec<(u64, String)>, end: u64) -> Self {
        symbols.sort();
        let mut text = Self::default();
        let mut code = None;
        for (address, name) in symbols.into_iter().chain([(end, "$d".to_owned())]) {
            if name.starts_with('$') {
                text.instructions.extend((code.unwrap_or(address)..address).step_by(4));
                code = name.starts_with("$x").then_some(address);
            } else if !name.starts_with("__") {
                text.functions
                    .entry(address)
                    .or_insert_with(|| format!("{:#}", rustc_demangle::demangle(&name)));
            }
        }
        text
    }

    /// Makes QEMU write what it translates of this code.
    fn qemu_options(&self, log: &Path) -> Result<Vec<String>> {
        let ends = self.instructions.first().zip(self.instructions.last());
        let (first, last) = ends.context("the image has no code")?;
        let words =
            ["-d", "in_asm", "-D", &log.to_string_lossy(), "-dfilter", &format!("{first:#x}..{last:#x}")];
        Ok(words.map(str::to_owned).to_vec())
    }

    fn rows(&self, run: &BTreeSet<u64>) -> Result<Vec<Covered>> {
        if let Some(address) = run.difference(&self.instructions).next() {
            anyhow::bail!("{address:#x} was run, which is no instruction of the image");
        }
        let counted = &(&self.instructions - &self.fill) - &self.panics;
        let panics = Covered::new(TO_PANIC, run.intersection(&self.panics).count(), self.panics.len());
        let run = run & &counted;
        let total = Covered::new("instructions", run.len(), counted.len()).against(TARGET);
        let mut functions: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for address in &counted {
            let function = self.functions.range(..=address).next_back();
            let (covered, total) = functions.entry(function.map_or("?", |(_, name)| name)).or_default();
            *covered += usize::from(run.contains(address));
            *total += 1;
        }
        let functions = functions
            .into_iter()
            .map(|(name, (covered, total))| Covered::new("instructions", covered, total).of_function(name));
        Ok([total, panics].into_iter().chain(functions).collect())
    }
}

/// Prints how many functions there are that no boot calls, and with `verbose` what was not run of which.
pub(super) fn tell(rows: &[Covered], verbose: bool) {
    let missed = |row: &&Covered| row.total - row.covered;
    let mut functions: Vec<&Covered> = rows.iter().filter(|row| row.function.is_some()).collect();
    let never = functions.iter().filter(|row| row.covered == 0).count();
    println!("\n{never} of {} functions of the EL2 image were never run", functions.len());
    for Covered { what, covered, total, .. } in rows.iter().filter(|row| row.what == TO_PANIC) {
        println!("not counted: {total} {what}, of which {covered} were run");
    }
    functions.retain(|row| missed(row) > 0);
    functions.sort_by_key(|row| std::cmp::Reverse(missed(row)));
    if verbose {
        println!("{:>6} {:>6}  function", "missed", "of");
        functions.iter().for_each(|row| {
            println!("{:>6} {:>6}  {}", missed(row), row.total, row.function.as_deref().unwrap_or_default());
        });
    }
    println!();
}

/// The addresses of instructions in a log of `-d in_asm`: lines such as `0x40200004:  d5384241  mrs x1, currentel`.
fn addresses(log: &str) -> Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for line in log.lines() {
        let Some((address, rest)) = line.strip_prefix("0x").and_then(|line| line.split_once(':')) else {
            continue;
        };
        let word = rest.split_whitespace().next().unwrap_or_default();
        let is_instruction = word.len() == 8 && u32::from_str_radix(word, 16).is_ok();
        ensure!(is_instruction, "this QEMU has no disassembler, or another form of log: {line}");
        found.insert(u64::from_str_radix(address, 16)?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Text {
        let symbols = [
            (0x1000, "__text_start"),
            (0x1000, "image_header"),
            (0x1000, "$x"),
            (0x1004, "$d"),
            (0x1040, "$x"),
            (0x1040, "_RNvNtCs1_3hyp4boot5start"),
            (0x1048, "$x.7"),
            (0x1048, "memcpy"),
        ];
        Text::from_symbols(symbols.map(|(address, name)| (address, name.to_owned())).to_vec(), 0x1054)
    }

    #[test]
    fn data_fill_and_what_follows_the_code_do_not_count() {
        let expected = [0x1000, 0x1040, 0x1044, 0x1048, 0x104c, 0x1050];
        assert_eq!(text().instructions, BTreeSet::from(expected));
        let options = text().qemu_options(Path::new("a.log")).unwrap();
        assert_eq!(options, ["-d", "in_asm", "-D", "a.log", "-dfilter", "0x1000..0x1050"]);
        let with_fill = Text { fill: BTreeSet::from([0x1044]), ..text() };
        let total = &with_fill.rows(&BTreeSet::from([0x1000, 0x1044])).unwrap()[0];
        assert_eq!((total.covered, total.total), (1, 5));
        let with_panic = Text { panics: BTreeSet::from([0x1044, 0x1048]), ..text() };
        let rows = with_panic.rows(&BTreeSet::from([0x1000, 0x1044])).unwrap();
        let numbers = rows.iter().take(2).map(|row| (row.covered, row.total)).collect::<Vec<_>>();
        assert_eq!(numbers, [(1, 4), (1, 2)]);
        assert!(Text::default().qemu_options(Path::new("a.log")).is_err());
    }

    #[test]
    fn instructions_that_were_run_are_counted_for_all_and_for_each_function() {
        let log = "----------------\nIN: \n0x00001000:  14000010  b        #0x1040\n\n----------------\nIN: \n\
                   0x00001040:  d5384241  mrs      x1, currentel\n0x00001044:  f100203f  cmp      x1, #8\n\n";
        let run = addresses(log).unwrap();
        let row = |covered, total| Covered::new("instructions", covered, total);
        let expected = [
            row(3, 6).against(TARGET),
            Covered::new(TO_PANIC, 0, 0),
            row(2, 2).of_function("hyp::boot::start"),
            row(1, 1).of_function("image_header"),
            row(0, 3).of_function("memcpy"),
        ];
        assert_eq!(text().rows(&run).unwrap(), expected);
    }

    #[test]
    fn a_log_of_other_code_or_without_instructions_is_refused() {
        assert!(text().rows(&BTreeSet::from([0x1004])).is_err());
        assert!(addresses("0x00001000:  OBJD-T: 10000014\n").is_err());
    }
}
