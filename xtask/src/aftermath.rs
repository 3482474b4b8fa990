//! After the end of a run: what the RAM that it left behind must and must not hold.

use crate::console::{Console, Ending};
use crate::elf;
use crate::ram::{RAM_BASE, RamFile};
use crate::report::Check;
use crate::scenario::Machine;
use crate::secret::Pattern;
use crate::stage2::{Region, Walk};
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::path::Path;

const PAGE: u64 = 4096;
/// Places of a find that are named.
const NAMED: usize = 4;
/// Parts of the hypervisor, each between two symbols. The whole comes first.
const REGIONS: [(&str, &str, &str); 7] = [
    ("image", "__image_start", "__image_end"),
    ("text", "__image_start", "__text_end"),
    ("rodata", "__text_end", "__rodata_end"),
    ("data", "__rodata_end", "__data_end"),
    ("stacks", "__stacks_start", "__stacks_end"),
    ("pool", "__pool_start", "__pool_end"),
    ("metadata", "__metadata_start", "__metadata_end"),
];

/// A run that is over.
#[derive(Debug)]
pub(crate) struct Aftermath<'a> {
    pub(crate) ram: Option<&'a RamFile>,
    pub(crate) machine: &'a Machine,
    /// The hypervisor's ELF file, for its symbols.
    pub(crate) hyp_elf: &'a Path,
    pub(crate) secret_nonce: Option<u64>,
    pub(crate) console: &'a Console,
    pub(crate) ending: Ending,
}

impl Aftermath<'_> {
    /// Searches all of RAM for the secret: it must be found if `wanted` (a control run), and not otherwise.
    pub(crate) fn search(&self, wanted: bool) -> Check {
        // A machine that is still up proves nothing about power-off.
        let found = match self.ending {
            Ending::Status(0) => self.search_ram(),
            _ => Err(anyhow::anyhow!("not searched: QEMU did not end well")),
        };
        judge_search(wanted, found)
    }

    fn search_ram(&self) -> Result<(usize, String)> {
        let ram = self.ram.context("RAM was not kept")?;
        let nonce = self.secret_nonce.context("there is no secret")?;
        let found = ram.search(&Pattern::of_nonce(nonce))?;
        let regions = self.hypervisor_regions().unwrap_or_default();
        let place = |address: &u64| {
            let region = regions.iter().rev().find(|region| region.range.contains(address));
            region.map_or(format!("{address:#x}"), |region| format!("{address:#x} ({})", region.name))
        };
        let mut observed = match found.addresses.len() {
            0 => "none".to_owned(),
            count => format!("{count} pieces"),
        };
        observed += &format!(" in {} MiB that hold data", found.searched >> 20);
        for address in found.addresses.iter().take(NAMED) {
            observed += &format!(", {}", place(address));
        }
        Ok((found.addresses.len(), observed))
    }

    /// Walks the host's stage-2 tables: no leaf may reach the hypervisor.
    pub(crate) fn walk(&self) -> Check {
        let expected = "no leaf of the host's stage-2 reaches the hypervisor";
        match self.walk_tables() {
            Ok((violations, observed)) if violations.is_empty() => {
                Check::new("walk", expected, observed, true)
            }
            Ok((violations, _)) => Check::new("walk", expected, violations.join("; "), false),
            Err(error) => Check::new("walk", expected, format!("{error:#}"), false),
        }
    }

    fn walk_tables(&self) -> Result<(Vec<String>, String)> {
        let ram = self.ram.context("RAM was not kept")?;
        let facts = self.console.facts("host stage-2 ").context("no `[deed] host stage-2` line")?;
        let bits = u32::try_from(number(&facts, "ipa_bits")?)?;
        let walk = Walk::from_root(ram, number(&facts, "root")?, bits)?;
        let regions = self.hypervisor_regions()?;
        let ram_end = RAM_BASE + self.machine.memory_bytes()?;
        let pages = walk.reachable_within(RAM_BASE..ram_end) / PAGE;
        // Tables that map nothing would pass everything else; so would a page too many that is not the image's.
        let verdict = self.console.facts("verdict ").context("no verdict")?;
        let expected = number(&verdict, "host")?;
        let mut violations = walk.violations(&regions);
        if pages != expected {
            violations.push(format!("{pages} pages of RAM are mapped, but {expected} are the host's"));
        }
        let (tables, regions) = (walk.tables.len(), regions.len());
        let observed =
            format!("{tables} tables map {pages} pages of RAM, none in the hypervisor's {regions} regions");
        Ok((violations, observed))
    }

    /// The hypervisor's memory, from where it says that it runs and from its symbols.
    fn hypervisor_regions(&self) -> Result<Vec<Region>> {
        let facts = self.console.facts("image ").context("no `[deed] image` line")?;
        let symbols = elf::symbols(&std::fs::read(self.hyp_elf)?)?;
        regions(number(&facts, "base")?, number(&facts, "end")?, &symbols)
    }
}

fn judge_search(wanted: bool, found: Result<(usize, String)>) -> Check {
    let expected = if wanted { "the secret is found in RAM" } else { "no piece of the secret in RAM" };
    match found {
        Ok((count, observed)) => Check::new("search", expected, observed, (count > 0) == wanted),
        Err(error) => Check::new("search", expected, format!("{error:#}"), false),
    }
}

fn regions(base: u64, end: u64, symbols: &HashMap<String, u64>) -> Result<Vec<Region>> {
    let symbol = |name: &str| symbols.get(name).copied().with_context(|| format!("no symbol {name}"));
    let start = symbol("__image_start")?;
    let size = symbol("__image_end")?.checked_sub(start).context("the image ends before it begins")?;
    ensure!(
        size > 0 && end.checked_sub(base) == Some(size),
        "the hypervisor says {base:#x}..{end:#x}, its symbols say {size:#x} bytes"
    );
    let region = |(name, first, last): (&str, &str, &str)| {
        let at = |name: &str| anyhow::Ok(base + symbol(name)?.wrapping_sub(start));
        let range = at(first)?..at(last)?;
        ensure!(range.start < range.end && range.end <= end, "the symbols of {name} are out of order");
        Ok(Region { name: format!("the hypervisor's {name}"), range })
    };
    REGIONS.into_iter().map(region).collect()
}

fn number(facts: &HashMap<&str, &str>, name: &str) -> Result<u64> {
    let text = facts.get(name).with_context(|| format!("`{name}` is missing in a `[deed]` line"))?;
    let value = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    value.with_context(|| format!("`{name}={text}` is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols() -> HashMap<String, u64> {
        let table = [
            ("__image_start", 0x1000),
            ("__text_end", 0x3000),
            ("__rodata_end", 0x4000),
            ("__data_end", 0x6000),
            ("__stacks_start", 0x6000),
            ("__stacks_end", 0x7000),
            ("__pool_start", 0x7000),
            ("__pool_end", 0x9000),
            ("__metadata_start", 0x9000),
            ("__metadata_end", 0xa000),
            ("__image_end", 0xa000),
        ];
        table.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    #[test]
    fn regions_lie_where_the_hypervisor_says_that_it_runs() {
        let regions = regions(0x4020_0000, 0x4020_9000, &symbols()).unwrap();
        assert_eq!(regions[0].range, 0x4020_0000..0x4020_9000);
        assert_eq!(regions[1].range, 0x4020_0000..0x4020_2000);
        assert_eq!(regions[5].range, 0x4020_6000..0x4020_8000);
    }

    #[test]
    fn symbols_that_contradict_the_console_or_each_other_are_refused() {
        assert!(regions(0x4020_0000, 0x4020_8000, &symbols()).is_err());
        assert!(regions(0x4020_0000, 0, &symbols()).is_err());
        for name in symbols().keys() {
            let mut without = symbols();
            without.remove(name);
            assert!(regions(0x4020_0000, 0x4020_9000, &without).is_err(), "{name}");
        }
        let mut swapped = symbols();
        swapped.insert("__pool_end".to_owned(), 0x6fff);
        assert!(regions(0x4020_0000, 0x4020_9000, &swapped).is_err());
    }

    #[test]
    fn a_search_passes_if_it_finds_what_is_wanted_and_nothing_otherwise() {
        let judge = |wanted, count| judge_search(wanted, Ok((count, String::new()))).pass;
        assert!(judge(false, 0) && judge(true, 1));
        assert!(!judge(false, 1) && !judge(true, 0));
        assert!(!judge_search(false, Err(anyhow::anyhow!("not searched"))).pass);
        assert!(!judge_search(true, Err(anyhow::anyhow!("not searched"))).pass);
    }

    #[test]
    fn numbers_are_read_in_both_notations() {
        let console = Console::parse("[deed] host stage-2 root=0x40300000 ipa_bits=40 bad=x\n");
        let facts = console.facts("host stage-2 ").unwrap();
        assert_eq!(number(&facts, "root").unwrap(), 0x4030_0000);
        assert_eq!(number(&facts, "ipa_bits").unwrap(), 40);
        assert!(number(&facts, "bad").is_err() && number(&facts, "absent").is_err());
    }
}
