//! Walks the host's stage-2 tables in the RAM that a run left behind, and checks that they reach nothing
//! of the hypervisor (invariant I3). Written from the architecture, not from the hypervisor's walker.
//!
//! VMSAv8-64, 4 KiB granule, translation from level 1 on with concatenated tables (Arm ARM, D8.2).

use anyhow::{Result, ensure};
use std::ops::Range;

/// Entries of one 4 KiB table.
const ENTRIES: usize = 512;
/// Bits 47:12 of a descriptor: address of the next table or of the page.
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const VALID: u64 = 1 << 0;
/// At levels 1 and 2: a table, not a block. At level 3: a page, and must be set.
const TABLE: u64 = 1 << 1;
/// More violations than this are not listed.
const LISTED: usize = 8;

/// Where tables are read from.
pub(crate) trait Memory {
    /// Returns the 512 descriptors of the table at a physical address.
    fn table(&self, address: u64) -> Result<Box<[u64; ENTRIES]>>;
}

impl Memory for crate::ram::RamFile {
    fn table(&self, address: u64) -> Result<Box<[u64; ENTRIES]>> {
        let mut bytes = [0; ENTRIES * 8];
        self.read(address, &mut bytes)?;
        let mut table = Box::new([0; ENTRIES]);
        for (descriptor, bytes) in table.iter_mut().zip(bytes.chunks_exact(8)) {
            *descriptor = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        }
        Ok(table)
    }
}

/// Physical memory that the host must not reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// What it is, for the message.
    pub(crate) name: String,
    /// First address and end.
    pub(crate) range: Range<u64>,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    /// Tables, the root's included.
    pub(crate) tables: Vec<u64>,
    /// Valid leaves: range of intermediate addresses and output address.
    leaves: Vec<(Range<u64>, u64)>,
}

impl Walk {
    /// Walks all tables from a root of `ipa_bits` bits (31 to 43: 1 to 16 concatenated level-1 tables).
    pub(crate) fn from_root(memory: &dyn Memory, root: u64, ipa_bits: u32) -> Result<Self> {
        ensure!((31..=43).contains(&ipa_bits), "{ipa_bits} bits cannot start at level 1");
        ensure!(root.is_multiple_of(0x1000), "the root {root:#x} is not aligned");
        let mut walk = Self::default();
        let entries = 1usize << (ipa_bits - 30);
        for table in 0..entries.div_ceil(ENTRIES) {
            let address = root + table as u64 * 0x1000;
            let covered = ENTRIES.min(entries);
            walk.table(memory, 1, address, (table as u64) << 39, covered)?;
        }
        Ok(walk)
    }

    fn table(
        &mut self,
        memory: &dyn Memory,
        level: u32,
        address: u64,
        ipa: u64,
        entries: usize,
    ) -> Result<()> {
        // A table that is reached twice would mean that two parts of the address space are one.
        ensure!(!self.tables.contains(&address), "the table at {address:#x} is linked twice");
        self.tables.push(address);
        let shift = 12 + 9 * (3 - level);
        let content = memory.table(address)?;
        for (index, descriptor) in content.iter().take(entries).enumerate() {
            let ipa = ipa + ((index as u64) << shift);
            let next = descriptor & ADDRESS;
            match (descriptor & VALID != 0, descriptor & TABLE != 0, level) {
                (false, ..) => {}
                (true, true, 1 | 2) => self.table(memory, level + 1, next, ipa, ENTRIES)?,
                (true, false, 1 | 2) | (true, true, _) => {
                    let size = 1u64 << shift;
                    ensure!(
                        next.is_multiple_of(size),
                        "leaf for {ipa:#x}: {next:#x} is not aligned to its size"
                    );
                    self.leaves.push((ipa..ipa + size, next));
                }
                (true, false, _) => anyhow::bail!("level 3 entry for {ipa:#x} is reserved: {descriptor:#x}"),
            }
        }
        Ok(())
    }

    /// Bytes of a range of physical memory that the host reaches.
    pub(crate) fn reachable_within(&self, range: Range<u64>) -> u64 {
        let overlap = |(ipa, output): &(Range<u64>, u64)| {
            let end = (output + (ipa.end - ipa.start)).min(range.end);
            end.saturating_sub((*output).max(range.start))
        };
        self.leaves.iter().map(overlap).sum()
    }

    /// Returns in words what is wrong: a leaf that reaches one of `forbidden` or a table of this walk, or
    /// that is not an identity mapping.
    pub(crate) fn violations(&self, forbidden: &[Region]) -> Vec<String> {
        let tables = self.tables.iter().map(|&at| Region { name: "table".into(), range: at..at + 0x1000 });
        let regions: Vec<Region> = forbidden.iter().cloned().chain(tables).collect();
        let mut violations = Vec::new();
        for (ipa, output) in &self.leaves {
            let size = ipa.end - ipa.start;
            if ipa.start != *output {
                violations.push(format!("{:#x} is mapped to {output:#x}", ipa.start));
            }
            for Region { name, range } in &regions {
                if *output < range.end && range.start < output + size {
                    let at = format!("{:#x}+{size:#x}", ipa.start);
                    violations.push(format!("leaf {at} reaches {name} {:#x}..{:#x}", range.start, range.end));
                }
            }
        }
        let more = violations.len().saturating_sub(LISTED);
        violations.truncate(LISTED);
        if more > 0 {
            violations.push(format!("and {more} more"));
        }
        violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use std::collections::HashMap;

    #[derive(Default)]
    struct Tables(HashMap<u64, [u64; ENTRIES]>);

    impl Tables {
        fn set(&mut self, table: u64, index: usize, descriptor: u64) -> &mut Self {
            self.0.entry(table).or_insert([0; ENTRIES])[index] = descriptor;
            self
        }
    }

    impl Memory for Tables {
        fn table(&self, address: u64) -> Result<Box<[u64; ENTRIES]>> {
            Ok(Box::new(*self.0.get(&address).context("no table here")?))
        }
    }

    const ROOT: u64 = 0x4400_0000;
    const L2: u64 = 0x4400_2000;
    const L3: u64 = 0x4400_3000;
    const BLOCK: u64 = 0b01;
    const PAGE: u64 = 0b11;

    /// 1 GiB of devices, then a 2 MiB block at 0x40000000 and two pages at 0x40200000 and 0x40201000, and a
    /// block in the second concatenated table.
    fn world() -> Tables {
        let mut tables = Tables::default();
        tables.set(ROOT, 0, BLOCK | 0x7fc);
        tables.set(ROOT, 1, L2 | PAGE);
        tables.set(ROOT + 0x1000, 511, 0xff_c000_0000 | BLOCK);
        tables.set(L2, 0, 0x4000_0000 | BLOCK);
        tables.set(L2, 1, L3 | PAGE);
        // An invalid entry may carry anything in its other bits.
        tables.set(L2, 2, 0x4040_0000 | TABLE);
        tables.set(L3, 0, 0x4020_0000 | PAGE | 0x3 << 6);
        tables.set(L3, 1, 0x4020_1000 | PAGE);
        tables
    }

    fn region(range: Range<u64>) -> Region {
        Region { name: "text".into(), range }
    }

    #[test]
    fn leaves_of_every_level_are_found() {
        let walk = Walk::from_root(&world(), ROOT, 40).unwrap();
        assert_eq!(walk.tables, [ROOT, L2, L3, ROOT + 0x1000]);
        assert_eq!(walk.reachable_within(0..u64::MAX), (2 << 30) + (2 << 20) + 0x2000);
        assert_eq!(walk.reachable_within(0x4000_1000..0x4020_1000), (2 << 20));
        assert_eq!(walk.violations(&[region(0x4020_2000..0x4022_0000)]), [] as [&str; 0]);
    }

    #[test]
    fn a_leaf_that_touches_the_hypervisor_is_a_violation() {
        let walk = Walk::from_root(&world(), ROOT, 40).unwrap();
        // Each of: inside a block, the last byte of a page, a region that holds a whole page.
        for range in [0x4010_0000..0x4010_1000, 0x4020_1fff..0x4030_0000, 0x401f_f000..0x4020_1000] {
            assert!(walk.violations(&[region(range.clone())])[0].contains("reaches text"), "{range:x?}");
        }
    }

    #[test]
    fn a_table_that_the_host_reaches_is_a_violation() {
        let mut tables = world();
        tables.set(L2, 32, 0x4400_0000 | BLOCK);
        let walk = Walk::from_root(&tables, ROOT, 40).unwrap();
        assert!(walk.violations(&[]).iter().all(|line| line.contains("reaches table")));
        assert_eq!(walk.violations(&[]).len(), 4);
    }

    #[test]
    fn what_is_not_mapped_to_itself_is_a_violation() {
        let mut tables = world();
        tables.set(L3, 1, 0x5000_0000 | PAGE);
        let walk = Walk::from_root(&tables, ROOT, 40).unwrap();
        assert_eq!(walk.violations(&[]), ["0x40201000 is mapped to 0x50000000"]);
    }

    #[test]
    fn broken_tables_are_an_error() {
        assert!(Walk::from_root(world().set(L3, 2, BLOCK), ROOT, 40).is_err());
        assert!(Walk::from_root(world().set(L2, 3, L3 | PAGE), ROOT, 40).is_err());
        assert!(Walk::from_root(world().set(L2, 3, 0x4400_9000 | PAGE), ROOT, 40).is_err());
        assert!(Walk::from_root(world().set(L2, 3, 0x4000_1000 | BLOCK), ROOT, 40).is_err());
        assert!(Walk::from_root(&world(), ROOT + 8, 40).is_err());
        assert!(Walk::from_root(&world(), ROOT, 48).is_err());
    }
}
