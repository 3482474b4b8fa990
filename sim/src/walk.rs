//! The table walk (Arm ARM D8.2), and the enumeration of everything that a walk can reach.

use crate::format::{Desc, Format, Limits, decode, span};
use crate::ram::{PAGE, Ram};

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Fetch an instruction.
    Execute,
}

/// Why an access was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The descriptor is invalid, or the input address is out of range (then the level is 0).
    Translation,
    /// The leaf's access flag is clear.
    AccessFlag,
    /// The leaf does not permit the access.
    Permission,
    /// The walk, or the access itself, went where there is no memory.
    External,
}

/// A fault, as a syndrome would describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// Level of the lookup that ended the walk.
    pub level: u8,
    /// Why.
    pub kind: FaultKind,
}

/// A stage-2 translation: what VTTBR_EL2 and VTCR_EL2 say.
///
/// With up to 43 bits the walk starts at level 1, and what exceeds 39 bits is resolved by concatenated root
/// tables (two at 40 bits); with more it starts at level 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stage2 {
    /// VTTBR_EL2.VMID.
    pub vmid: u16,
    /// VTTBR_EL2.BADDR: address of the first root table.
    pub root: u64,
    /// Size of the input address: 64 - VTCR_EL2.T0SZ, 32 to 48.
    pub ipa_bits: u32,
}

/// EL2's own stage 1: what TTBR0_EL2 and TCR_EL2 say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct El2Stage1 {
    /// TTBR0_EL2.BADDR: address of the level 0 table.
    pub root: u64,
    /// Size of the input address: 64 - TCR_EL2.T0SZ, 40 to 48 (start at level 0).
    pub va_bits: u32,
}

/// Whose translations: what a TLB entry is tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Regime {
    /// Stage 2, by VMID.
    Stage2 {
        /// The VMID.
        vmid: u16,
    },
    /// EL2.
    El2,
}

impl Regime {
    /// The host's stage 2, by Deed's convention.
    pub(crate) const HOST: Self = Self::Stage2 { vmid: 0 };
}

impl std::fmt::Display for Regime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            &Self::HOST => f.write_str("the host"),
            Self::Stage2 { vmid } => write!(f, "the guest with VMID {vmid}"),
            Self::El2 => f.write_str("EL2"),
        }
    }
}

/// A valid block or page that a walk reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// First input address: an IPA, or a VA of EL2.
    pub ipa: u64,
    /// First output address.
    pub pa: u64,
    /// 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// Loads are permitted.
    pub read: bool,
    /// Stores are permitted.
    pub write: bool,
    /// Instruction fetches are permitted, at EL1 or at EL0 at least.
    pub execute: bool,
    /// MemAttr\[3:0\] at stage 2; AttrIndx at EL2.
    pub memattr: u8,
    /// Software bits 58:55.
    pub sw: u8,
}

impl Leaf {
    /// Tells whether the leaf permits an access.
    #[must_use]
    pub fn permits(&self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Execute => self.execute,
        }
    }

    /// Returns the level of the descriptor that the leaf comes from.
    pub(crate) fn level(&self) -> u8 {
        if self.size == span(3) {
            3
        } else if self.size == span(2) {
            2
        } else {
            1
        }
    }
}

/// A translation in the terms of the walk, whichever stage it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) regime: Regime,
    pub(crate) format: Format,
    pub(crate) root: u64,
    pub(crate) start: u8,
    pub(crate) bits: u32,
}

impl From<Stage2> for Space {
    #[track_caller]
    fn from(stage2: Stage2) -> Self {
        let Stage2 { vmid, root, ipa_bits } = stage2;
        assert!((32..=48).contains(&ipa_bits), "sim: stage 2 with {ipa_bits} bits of IPA");
        let start = if ipa_bits <= 43 { 1 } else { 0 };
        Self { regime: Regime::Stage2 { vmid }, format: Format::Stage2, root, start, bits: ipa_bits }
    }
}

impl From<El2Stage1> for Space {
    #[track_caller]
    fn from(el2: El2Stage1) -> Self {
        let El2Stage1 { root, va_bits } = el2;
        assert!((40..=48).contains(&va_bits), "sim: EL2 stage 1 with {va_bits} bits of VA");
        Self { regime: Regime::El2, format: Format::El2, root, start: 0, bits: va_bits }
    }
}

impl Space {
    /// Returns the number of concatenated root tables.
    pub(crate) fn root_tables(&self) -> u64 {
        let resolved = 48 - 9 * u32::from(self.start);
        1 << self.bits.saturating_sub(resolved)
    }
}

/// A pointer to a table: what a walk has in hand between two lookups, and what a walk cache keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePointer {
    /// Level of the descriptors in the table.
    pub(crate) level: u8,
    /// Where the table is.
    pub(crate) table: u64,
    /// What the levels above took away.
    pub(crate) limits: Limits,
}

/// What a lookup finds, for those who watch a walk: TLBs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A table descriptor at `level` that covers the addresses from `ia`.
    Table { level: u8, ia: u64, pointer: TablePointer },
    /// A leaf with its access flag set.
    Leaf(Leaf),
}

impl Limits {
    fn and(self, other: Self) -> Self {
        Self { no_write: self.no_write || other.no_write, no_execute: self.no_execute || other.no_execute }
    }
}

/// Interprets the word of a descriptor at `level` that covers the addresses from `ia`.
pub(crate) fn lookup(format: Format, limits: Limits, level: u8, ia: u64, word: u64) -> Result<Found, Fault> {
    match decode(format, level, word) {
        Desc::Invalid => Err(Fault { level, kind: FaultKind::Translation }),
        Desc::Table { next, limits: own } => Ok(Found::Table {
            level,
            ia,
            pointer: TablePointer { level: level + 1, table: next, limits: limits.and(own) },
        }),
        Desc::Leaf(leaf) if !leaf.accessed => Err(Fault { level, kind: FaultKind::AccessFlag }),
        Desc::Leaf(leaf) => Ok(Found::Leaf(Leaf {
            ipa: ia,
            pa: leaf.pa,
            size: span(level),
            read: leaf.read,
            write: leaf.write && !limits.no_write,
            execute: leaf.execute && !limits.no_execute,
            memattr: leaf.memattr,
            sw: leaf.sw,
        })),
    }
}

/// Walks for `ia` from the root, showing each step to `visit`.
pub(crate) fn walk(ram: &Ram, space: &Space, ia: u64, visit: impl FnMut(Found)) -> Result<Leaf, Fault> {
    if ia >> space.bits != 0 {
        return Err(Fault { level: 0, kind: FaultKind::Translation });
    }
    // Concatenated root tables lie one after the other, so the first index is not cut to nine bits.
    let index = ia / span(space.start);
    let pointer = TablePointer { level: space.start, table: space.root, limits: Limits::default() };
    descend(ram, space.format, pointer, index, ia, visit)
}

/// Walks for `ia` from a table somewhere in the middle.
pub(crate) fn walk_from(
    ram: &Ram,
    format: Format,
    pointer: TablePointer,
    ia: u64,
    visit: impl FnMut(Found),
) -> Result<Leaf, Fault> {
    descend(ram, format, pointer, ia / span(pointer.level) % 512, ia, visit)
}

fn descend(
    ram: &Ram,
    format: Format,
    mut pointer: TablePointer,
    mut index: u64,
    ia: u64,
    mut visit: impl FnMut(Found),
) -> Result<Leaf, Fault> {
    loop {
        let level = pointer.level;
        let word = ram.peek(pointer.table + index * 8).ok_or(Fault { level, kind: FaultKind::External })?;
        let found = lookup(format, pointer.limits, level, ia & !(span(level) - 1), word)?;
        visit(found);
        match found {
            Found::Leaf(leaf) => return Ok(leaf),
            Found::Table { pointer: next, .. } => pointer = next,
        }
        index = ia / span(pointer.level) % 512;
    }
}

/// One who is shown what walks can find.
pub(crate) trait Visitor {
    /// Comes to a table that translates the addresses from `ia` on. Returns whether it is to be shown what is in
    /// there: not if all of it is known. Tables below are shown in any case.
    fn enter(&mut self, pointer: TablePointer, ia: u64) -> bool;

    /// Finds something.
    fn find(&mut self, found: Found);
}

/// Shows everything that walks of `space` can find, in the order of addresses, a table before what is below it.
pub(crate) fn explore(ram: &Ram, space: &Space, visitor: &mut impl Visitor) {
    for number in 0..space.root_tables() {
        let pointer =
            TablePointer { level: space.start, table: space.root + number * PAGE, limits: Limits::default() };
        explore_table(ram, space, pointer, number * span(space.start) * 512, visitor);
    }
}

fn explore_table(ram: &Ram, space: &Space, pointer: TablePointer, base: u64, visitor: &mut impl Visitor) {
    let Some(words) = ram.words(pointer.table) else { return };
    let is_shown = visitor.enter(pointer, base);
    if !is_shown && pointer.level == 3 {
        return;
    }
    // Most words are invalid, or no tables: a look at bits 1:0 spares the rest (D8.3.1).
    let bits = if is_shown { 0b01 } else { 0b11 };
    for (index, &word) in (0u64..).zip(words).filter(|(_, word)| **word & bits == bits) {
        let ia = base + index * span(pointer.level);
        if ia >> space.bits != 0 {
            return;
        }
        let Ok(found) = lookup(space.format, pointer.limits, pointer.level, ia, word) else { continue };
        if is_shown {
            visitor.find(found);
        }
        if let Found::Table { pointer, .. } = found {
            explore_table(ram, space, pointer, ia, visitor);
        }
    }
}

/// Returns every leaf that walks of `space` can find, in the order of addresses.
pub(crate) fn leaves(ram: &Ram, space: &Space) -> Vec<Leaf> {
    struct Leaves(Vec<Leaf>);

    impl Visitor for Leaves {
        fn enter(&mut self, _pointer: TablePointer, _ia: u64) -> bool {
            true
        }

        fn find(&mut self, found: Found) {
            if let Found::Leaf(leaf) = found {
                self.0.push(leaf);
            }
        }
    }

    let mut leaves = Leaves(Vec::new());
    explore(ram, space, &mut leaves);
    leaves.0
}

/// Tells whether the present tables grant everything that `leaf` grants: the same output for each of its
/// addresses, with at least its permissions.
pub(crate) fn grants(ram: &Ram, space: &Space, leaf: &Leaf) -> bool {
    let mut offset = 0;
    while offset < leaf.size {
        let ia = leaf.ipa + offset;
        let Ok(present) = walk(ram, space, ia, |_| {}) else { return false };
        let same_output = present.pa + (ia - present.ipa) == leaf.pa + offset;
        let covers = |access| !leaf.permits(access) || present.permits(access);
        if !(same_output && covers(Access::Read) && covers(Access::Write) && covers(Access::Execute)) {
            return false;
        }
        offset += present.ipa + present.size - ia;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;
    use crate::testing::{RAM, RO, RW, XN, block, page, table};

    fn ram() -> Ram {
        Ram::new(&[Region { base: RAM, size: 1 << 30 }])
    }

    fn stage2(ipa_bits: u32) -> Space {
        Stage2 { vmid: 1, root: RAM, ipa_bits }.into()
    }

    #[test]
    fn level_of_a_fault_is_where_the_walk_ended() {
        let mut ram = ram();
        let space = stage2(40);
        let fault = |ram: &Ram, ia| walk(ram, &space, ia, |_| {}).unwrap_err();
        assert_eq!(fault(&ram, 0), Fault { level: 1, kind: FaultKind::Translation });
        ram.poke(RAM, table(RAM + 0x2000));
        assert_eq!(fault(&ram, 0), Fault { level: 2, kind: FaultKind::Translation });
        ram.poke(RAM + 0x2000, table(RAM + 0x3000));
        assert_eq!(fault(&ram, 0), Fault { level: 3, kind: FaultKind::Translation });
        ram.poke(RAM + 0x3000, page(RAM + 0x9000, RW & !(1 << 10)));
        assert_eq!(fault(&ram, 0), Fault { level: 3, kind: FaultKind::AccessFlag });
        assert_eq!(fault(&ram, 1 << 40), Fault { level: 0, kind: FaultKind::Translation });
        ram.poke(RAM + 8, table(0x1000));
        assert_eq!(fault(&ram, 1 << 30), Fault { level: 2, kind: FaultKind::External });
    }

    #[test]
    fn blocks_and_pages_translate_their_whole_range() {
        let mut ram = ram();
        let space = stage2(39);
        ram.poke(RAM + 3 * 8, block(0xc000_0000, RW));
        ram.poke(RAM + 8, table(RAM + 0x2000));
        ram.poke(RAM + 0x2000 + 5 * 8, block(RAM + 0x20_0000, RO | XN));
        ram.poke(RAM + 0x2000, table(RAM + 0x3000));
        ram.poke(RAM + 0x3ff8, page(RAM + 0x7000, RW | 0b0110 << 55));
        let found = leaves(&ram, &space);
        assert_eq!(found.iter().map(|leaf| leaf.size).collect::<Vec<_>>(), [0x1000, 0x20_0000, 1 << 30]);
        assert_eq!(found.iter().map(Leaf::level).collect::<Vec<_>>(), [3, 2, 1]);
        assert_eq!(found[0].ipa, (1 << 30) + 0x1f_f000);
        assert_eq!((found[0].pa, found[0].sw), (RAM + 0x7000, 0b0110));
        assert!(found[1].read && !found[1].write && !found[1].execute);
        for leaf in found {
            for ia in [leaf.ipa, leaf.ipa + leaf.size / 2, leaf.ipa + leaf.size - 1] {
                assert_eq!(walk(&ram, &space, ia, |_| {}), Ok(leaf));
            }
        }
    }

    #[test]
    fn root_of_40_bits_is_two_concatenated_tables() {
        let mut ram = ram();
        assert_eq!(stage2(40).root_tables(), 2);
        assert_eq!(stage2(39).root_tables(), 1);
        assert_eq!(stage2(32).root_tables(), 1);
        assert_eq!(stage2(43).root_tables(), 16);
        assert_eq!((stage2(48).root_tables(), stage2(48).start), (1, 0));
        ram.poke(RAM + 0x1ff8, block(0x8000_0000, RW));
        let top = (1 << 40) - (1 << 30);
        assert_eq!(walk(&ram, &stage2(40), top + 5, |_| {}).map(|leaf| leaf.pa), Ok(0x8000_0000));
        assert_eq!(leaves(&ram, &stage2(40)).first().map(|leaf| leaf.ipa), Some(top));
        assert!(leaves(&ram, &stage2(39)).is_empty());
    }

    #[test]
    fn small_input_size_ignores_entries_beyond_it() {
        let mut ram = ram();
        ram.poke(RAM + 4 * 8, block(0x8000_0000, RW));
        assert!(leaves(&ram, &stage2(32)).is_empty());
        assert_eq!(leaves(&ram, &stage2(33)).len(), 1);
    }

    #[test]
    fn el2_walk_has_four_levels_and_hierarchical_limits() {
        let mut ram = ram();
        let space: Space = El2Stage1 { root: RAM, va_bits: 48 }.into();
        ram.poke(RAM + 511 * 8, table(RAM + 0x1000));
        ram.poke(RAM + 0x1000, table(RAM + 0x2000) | 1 << 62);
        ram.poke(RAM + 0x2000, table(RAM + 0x3000) | 1 << 60);
        ram.poke(RAM + 0x3000, page(RAM + 0x9000, 1 << 10));
        let va = 511 << 39;
        let mut steps = 0;
        let leaf = walk(&ram, &space, va, |_| steps += 1).unwrap();
        assert_eq!(steps, 4);
        assert_eq!(leaf.pa, RAM + 0x9000);
        assert!(leaf.read && !leaf.write && !leaf.execute);
        assert_eq!(leaves(&ram, &space), [leaf]);
    }

    #[test]
    fn pages_grant_what_a_block_granted_only_if_all_of_them_do() {
        let mut ram = ram();
        let space = stage2(39);
        ram.poke(RAM, table(RAM + 0x2000));
        ram.poke(RAM + 0x2000, block(RAM + 0x20_0000, RW));
        let old = walk(&ram, &space, 0, |_| {}).unwrap();
        assert!(grants(&ram, &space, &old));
        for index in 0..512 {
            ram.poke(RAM + 0x3000 + index * 8, page(RAM + 0x20_0000 + index * 0x1000, RW));
        }
        ram.poke(RAM + 0x2000, table(RAM + 0x3000));
        assert!(grants(&ram, &space, &old));
        let last = RAM + 0x3ff8;
        for word in [0, page(RAM + 0x3f_f000, RO), page(RAM + 0x3f_f000, RW | XN), page(RAM + 0x3f_e000, RW)]
        {
            ram.poke(last, word);
            assert!(!grants(&ram, &space, &old), "{word:#x}");
        }
    }

    #[test]
    #[should_panic(expected = "31 bits of IPA")]
    fn unsupported_input_size_is_refused() {
        let _ = stage2(31);
    }
}
