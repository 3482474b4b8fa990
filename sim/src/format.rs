//! VMSAv8-64 descriptors with the 4 KiB granule and 48-bit addresses, read from the Arm ARM (D8.3):
//! stage 2 without FEAT_S2FWB, with FEAT_XNX; stage 1 of EL2 with HCR_EL2.E2H = 0. Neither the Contiguous
//! bit nor hardware management of dirty state is part of this machine.

/// Bits 1:0 of a table descriptor, and of a page descriptor at level 3.
const TABLE_OR_PAGE: u64 = 0b11;
/// Output address of a table or page descriptor.
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
/// Bits of a leaf that the hardware ignores and software uses: 58:55, and at stage 2 also 62:59, VTCR_EL2.HWU59 to
/// HWU62 being 0 on this machine.
const fn software(format: Format) -> u64 {
    match format {
        Format::Stage2 => 0xff << 55,
        Format::El2 => 0xf << 55,
    }
}
/// Access flag.
const AF: u64 = 1 << 10;
/// Bits 49:48: address bits of a feature (FEAT_LPA) that this machine lacks.
const HIGH_ADDRESS: u64 = 0b11 << 48;
/// DBM and Contiguous.
const DBM_CONTIGUOUS: u64 = 0b11 << 51;
/// Bits of an EL2 table descriptor that bind the levels below: NSTable, APTable, XNTable, PXNTable.
const HIERARCHICAL: u64 = 0b1_1111 << 59;

/// Which of the two formats a table is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Stage 2 of the EL1&0 regime.
    Stage2,
    /// Stage 1 of EL2.
    El2,
}

/// What the table descriptors on the way take away from a leaf (stage 1 only).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// `APTable[1]`: no write.
    pub(crate) no_write: bool,
    /// XNTable: no execution.
    pub(crate) no_execute: bool,
}

/// A leaf descriptor, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafDesc {
    pub(crate) pa: u64,
    pub(crate) accessed: bool,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
    pub(crate) memattr: u8,
    pub(crate) sw: u8,
}

/// A descriptor, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Desc {
    /// Bit 0 is clear, or the encoding is reserved at this level: a translation fault.
    Invalid,
    /// Points to the table of the next level.
    Table { next: u64, limits: Limits },
    /// A block or page.
    Leaf(LeafDesc),
}

/// Returns the bytes that one descriptor of a level covers.
pub(crate) const fn span(level: u8) -> u64 {
    1 << (39 - 9 * level)
}

/// Decodes the descriptor `word` found at `level` (0 to 3).
pub(crate) fn decode(format: Format, level: u8, word: u64) -> Desc {
    match (level, word & 0b11) {
        (0..=2, TABLE_OR_PAGE) => Desc::Table { next: word & ADDRESS, limits: limits(format, word) },
        (3, TABLE_OR_PAGE) | (1 | 2, 0b01) => Desc::Leaf(leaf(format, level, word)),
        _ => Desc::Invalid,
    }
}

fn limits(format: Format, word: u64) -> Limits {
    match format {
        Format::Stage2 => Limits::default(),
        Format::El2 => Limits { no_write: word >> 62 & 1 == 1, no_execute: word >> 60 & 1 == 1 },
    }
}

fn leaf(format: Format, level: u8, word: u64) -> LeafDesc {
    let pa = word & ADDRESS & !(span(level) - 1);
    let accessed = word & AF != 0;
    let sw = ((word & software(format)) >> 55) as u8;
    match format {
        // S2AP: bit 6 read, bit 7 write. XN[1:0] = 0b10 bars both EL1 and EL0; any other value lets one of
        // them execute. Whether the page can be read plays no part.
        Format::Stage2 => LeafDesc {
            pa,
            accessed,
            read: word >> 6 & 1 == 1,
            write: word >> 7 & 1 == 1,
            execute: word >> 53 & 0b11 != 0b10,
            memattr: (word >> 2 & 0xf) as u8,
            sw,
        },
        // AP[2], bit 7: read only. XN: bit 54.
        Format::El2 => LeafDesc {
            pa,
            accessed,
            read: true,
            write: word >> 7 & 1 == 0,
            execute: word >> 54 & 1 == 0,
            memattr: (word >> 2 & 0b111) as u8,
            sw,
        },
    }
}

/// Tells whether the hardware takes `word` for a valid descriptor at `level`.
pub(crate) fn is_valid(level: u8, word: u64) -> bool {
    !matches!(decode(Format::Stage2, level, word), Desc::Invalid)
}

/// Returns what of a descriptor may not change while it is live: two valid words with the same
/// significant part translate alike.
pub(crate) fn significant(format: Format, level: u8, word: u64) -> u64 {
    match (decode(format, level, word), format) {
        (Desc::Invalid, _) => 0,
        (Desc::Table { .. }, Format::Stage2) => word & (ADDRESS | 0b11),
        (Desc::Table { .. }, Format::El2) => word & (ADDRESS | HIERARCHICAL | 0b11),
        (Desc::Leaf(_), _) => word & !software(format),
    }
}

/// Tells whether a word with bit 0 set is not a descriptor that this machine defines.
pub(crate) fn is_malformed(format: Format, level: u8, word: u64) -> bool {
    match decode(format, level, word) {
        Desc::Invalid => word & 1 == 1,
        Desc::Table { .. } => word & HIGH_ADDRESS != 0,
        Desc::Leaf(leaf) => {
            leaf.pa != word & ADDRESS
                || word & (HIGH_ADDRESS | DBM_CONTIGUOUS) != 0
                || (format == Format::Stage2 && word >> 50 & 1 == 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: u64 = AF | 0b11 << 8 | 0b11 << 6 | 0b1111 << 2;

    fn stage2(word: u64) -> LeafDesc {
        match decode(Format::Stage2, 3, word | 0b11) {
            Desc::Leaf(leaf) => leaf,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn kinds_follow_level_and_low_bits() {
        for level in 0..=3 {
            assert_eq!(decode(Format::Stage2, level, LEAF), Desc::Invalid);
            assert_eq!(decode(Format::Stage2, level, LEAF | 0b10), Desc::Invalid);
        }
        assert!(matches!(decode(Format::Stage2, 0, 0x1003), Desc::Table { next: 0x1000, .. }));
        assert!(matches!(decode(Format::Stage2, 2, 0x1003), Desc::Table { next: 0x1000, .. }));
        assert!(matches!(decode(Format::Stage2, 1, LEAF | 1), Desc::Leaf(_)));
        assert!(matches!(decode(Format::Stage2, 2, LEAF | 1), Desc::Leaf(_)));
        assert!(matches!(decode(Format::Stage2, 3, LEAF | 3), Desc::Leaf(_)));
        assert_eq!(decode(Format::Stage2, 0, LEAF | 1), Desc::Invalid);
        assert_eq!(decode(Format::Stage2, 3, LEAF | 1), Desc::Invalid);
    }

    #[test]
    fn spans_are_those_of_the_4_kib_granule() {
        assert_eq!([span(0), span(1), span(2), span(3)], [1 << 39, 1 << 30, 2 << 20, 4096]);
    }

    #[test]
    fn stage2_permissions_follow_s2ap_and_xn() {
        for (s2ap, read, write) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)] {
            let leaf = stage2(s2ap << 6);
            assert_eq!((leaf.read, leaf.write), (read, write), "S2AP {s2ap}");
        }
        for (xn, execute) in [(0, true), (1, true), (2, false), (3, true)] {
            assert_eq!(stage2(xn << 53).execute, execute, "XN {xn}");
        }
    }

    #[test]
    fn stage2_attributes_are_decoded() {
        let leaf = stage2(0x0000_8765_4321_f000 | LEAF | 0b1010 << 55);
        assert_eq!((leaf.pa, leaf.memattr, leaf.sw, leaf.accessed), (0x8765_4321_f000, 0xf, 0b1010, true));
        assert!(!stage2(0).accessed);
    }

    #[test]
    fn el2_permissions_follow_ap2_and_xn() {
        let Desc::Leaf(leaf) = decode(Format::El2, 3, AF | 3) else { panic!() };
        assert!(leaf.read && leaf.write && leaf.execute);
        let Desc::Leaf(leaf) = decode(Format::El2, 3, AF | 3 | 1 << 7 | 1 << 54 | 0b101 << 2) else {
            panic!()
        };
        assert!(leaf.read && !leaf.write && !leaf.execute);
        assert_eq!(leaf.memattr, 5);
    }

    #[test]
    fn hierarchical_limits_exist_in_stage_1_only() {
        let word = 1 << 62 | 1 << 60 | 0x1003;
        let Desc::Table { limits, .. } = decode(Format::El2, 1, word) else { panic!() };
        assert!(limits.no_write && limits.no_execute);
        let Desc::Table { limits, .. } = decode(Format::Stage2, 1, word) else { panic!() };
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn only_software_bits_of_a_leaf_are_insignificant() {
        let word = 0x4000_0000 | LEAF | 0b11;
        for bit in 2..64 {
            let same =
                significant(Format::Stage2, 3, word) == significant(Format::Stage2, 3, word ^ 1 << bit);
            assert_eq!(same, (55..=62).contains(&bit), "bit {bit}");
        }
    }

    #[test]
    fn only_the_address_of_a_stage2_table_is_significant() {
        for bit in 2..64 {
            let same =
                significant(Format::Stage2, 1, 0x1003) == significant(Format::Stage2, 1, 0x1003 ^ 1 << bit);
            assert_eq!(same, !(12..48).contains(&bit), "bit {bit}");
            let same = significant(Format::El2, 1, 0x1003) == significant(Format::El2, 1, 0x1003 ^ 1 << bit);
            assert_eq!(same, !(12..48).contains(&bit) && bit < 59, "bit {bit} at EL2");
        }
    }

    #[test]
    fn malformed_descriptors_are_told_apart() {
        let s2 = |level, word| is_malformed(Format::Stage2, level, word);
        assert!(!s2(3, LEAF | 3) && !s2(2, 0x20_0000 | LEAF | 1) && !s2(1, 0x1003) && !s2(3, LEAF));
        assert!(s2(3, LEAF | 1), "reserved encoding at level 3");
        assert!(s2(0, LEAF | 1), "512 GiB block");
        assert!(s2(2, 0x1000 | LEAF | 1), "block not aligned");
        for bit in 48..=52 {
            assert!(s2(3, LEAF | 3 | 1 << bit), "bit {bit}");
        }
        assert!(!is_malformed(Format::El2, 3, LEAF | 3 | 1 << 50), "GP of stage 1");
        assert!(s2(1, 0x1003 | 1 << 48), "table address above 48 bits");
    }
}
