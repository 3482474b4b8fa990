//! What the machine remembers for tests: a ring of events, and the breaches of discipline.

use std::collections::VecDeque;
use std::fmt;

use crate::tables::TableKind;
use crate::walk::Regime;

/// Events that the ring holds; older ones are dropped.
pub(crate) const RING: usize = 4096;

/// A step that the hypervisor took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A descriptor was written.
    WriteDesc {
        /// Where.
        pa: u64,
        /// The word before.
        old: u64,
        /// The word after.
        new: u64,
    },
    /// A table became the root of a translation.
    TableRoot {
        /// The (first) root table.
        pa: u64,
        /// What it translates for.
        kind: TableKind,
    },
    /// A root is no longer loaded on any CPU.
    RetireRoot {
        /// The (first) root table.
        pa: u64,
    },
    /// A table page was given back.
    FreeTable {
        /// The page.
        pa: u64,
    },
    /// Stage-2 translations of a range of one VMID were invalidated on all CPUs.
    TlbiStage2Ipa {
        /// The CPU that asked.
        cpu: usize,
        /// The VMID.
        vmid: u16,
        /// First address of the range.
        ipa: u64,
        /// Length of the range.
        bytes: u64,
    },
    /// All translations of one VMID were invalidated on all CPUs.
    TlbiStage2Vmid {
        /// The CPU that asked.
        cpu: usize,
        /// The VMID.
        vmid: u16,
    },
    /// All EL1&0 translations were invalidated on all CPUs.
    TlbiAll {
        /// The CPU that asked.
        cpu: usize,
    },
    /// EL2 translations of a range were invalidated on all CPUs.
    TlbiHypVa {
        /// The CPU that asked.
        cpu: usize,
        /// First address of the range.
        va: u64,
        /// Length of the range.
        bytes: u64,
    },
    /// All EL2 translations were invalidated on all CPUs.
    TlbiHypAll {
        /// The CPU that asked.
        cpu: usize,
    },
    /// Descriptor stores were made visible to all table walks.
    DsbIshst,
    /// A page was zeroed, in the caches.
    ZeroPage {
        /// The page.
        pa: u64,
    },
    /// A page was cleaned to the point of coherency.
    CleanPage {
        /// The page.
        pa: u64,
    },
    /// A page was zeroed and cleaned to the point of coherency.
    WipePage {
        /// The page.
        pa: u64,
    },
    /// The instruction caches of all CPUs were invalidated.
    InvalidateIcache,
}

/// A breach of the discipline of page tables. `pa` is the address of the descriptor unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A live, valid descriptor was replaced by another valid one that translates differently, without
    /// break-before-make (Arm ARM D8.16.1). Only bits that hardware ignores may change in place.
    ValidToValid {
        /// The descriptor.
        pa: u64,
        /// The word before.
        old: u64,
        /// The word after.
        new: u64,
    },
    /// A descriptor was broken, but made anew with another translation before the old one was invalidated
    /// (wrong VMID, wrong address, too short a range, or no TLBI at all).
    MadeBeforeTlbi {
        /// The descriptor.
        pa: u64,
        /// The valid word that TLBs may still hold.
        old: u64,
        /// The word after.
        new: u64,
    },
    /// A valid descriptor has a reserved encoding, an output address that is not aligned to its size, or
    /// bits that this machine's features reserve.
    Malformed {
        /// The descriptor.
        pa: u64,
        /// The word.
        word: u64,
    },
    /// A table was linked (or made a root) before every one of its descriptors was initialised.
    UninitialisedTable {
        /// The table page.
        table: u64,
    },
    /// A table was linked (or made a root) before the writes of its descriptors were made visible: a walk may find
    /// what was there before.
    UnpublishedTable {
        /// The table page.
        table: u64,
    },
    /// A table that was unlinked elsewhere was linked before TLBs forgot its old place.
    LinkedBeforeTlbi {
        /// The table page.
        table: u64,
    },
    /// A page that walks may reach as a table was mapped by a stage 2: whoever is behind it could write his own
    /// translations.
    TableExposed {
        /// The descriptor that gives access.
        pa: u64,
        /// The table page.
        table: u64,
    },
    /// A table was linked that lies outside RAM, or a root that is not aligned to its size.
    MisplacedTable {
        /// The table page.
        table: u64,
    },
    /// A table was linked that is already part of a tree.
    LinkedTwice {
        /// The table page.
        table: u64,
    },
    /// A descriptor was written into a page that was given back as a table.
    WriteAfterFree {
        /// The descriptor.
        pa: u64,
    },
    /// A valid descriptor was written into a table that is unlinked but that walks may still reach.
    WriteBeforeTlbi {
        /// The descriptor.
        pa: u64,
    },
    /// A table page was given back while it is linked.
    FreedWhileLinked {
        /// The table page.
        table: u64,
    },
    /// A table page was given back before TLBs forgot it and all that it translated.
    FreedBeforeTlbi {
        /// The table page.
        table: u64,
    },
    /// A table page was given back twice.
    FreedTwice {
        /// The table page.
        table: u64,
    },
    /// A table page that walks may reach was written by something other than a descriptor write.
    BypassedWrite {
        /// The address written.
        pa: u64,
    },
    /// A page was mapped for one party while TLBs may still hold another party's revoked translation to it
    /// (access is taken away before it is given).
    GivenBeforeTaken {
        /// The descriptor that gives access.
        pa: u64,
        /// The first page concerned.
        output: u64,
        /// Whose revoked translation is still out.
        held_by: Regime,
    },
    /// A page was wiped while TLBs may still hold a revoked translation to it.
    WipedBeforeTaken {
        /// The page.
        page: u64,
        /// Whose revoked translation is still out.
        held_by: Regime,
    },
    /// A page was wiped, or cleaned, while somebody had it, who could write to it again: this is seen when it is
    /// taken from him.
    MaintainedBeforeTaken {
        /// The page.
        page: u64,
        /// Whose translation was still there.
        held_by: Regime,
    },
}

/// Where a descriptor is.
struct Entry(u64);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {} of the table in page {:#x}", (self.0 & 0xfff) / 8, self.0 >> 12)
    }
}

/// What a descriptor shows.
struct Shown(u64);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const OUTPUT: u64 = 0x0000_ffff_ffff_f000;
        match self.0 & 1 {
            0 => f.write_str("nothing"),
            _ => write!(f, "page {:#x} (word {:#x})", (self.0 & OUTPUT) >> 12, self.0),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ValidToValid { pa, old, new } => {
                write!(
                    f,
                    "{} was changed without a break: it showed {}, and shows {}",
                    Entry(pa),
                    Shown(old),
                    Shown(new)
                )
            }
            Self::MadeBeforeTlbi { pa, old, new } => write!(
                f,
                "{} was made anew before TLBs were told: they may hold {}, and it shows {}",
                Entry(pa),
                Shown(old),
                Shown(new)
            ),
            Self::Malformed { pa, word } => write!(f, "{} holds a word that is none: {word:#x}", Entry(pa)),
            Self::UninitialisedTable { table } => {
                write!(f, "page {:#x} became a table before all its entries were written", table >> 12)
            }
            Self::UnpublishedTable { table } => {
                write!(f, "page {:#x} became a table before walks could see its entries", table >> 12)
            }
            Self::LinkedBeforeTlbi { table } => {
                write!(f, "page {:#x} became a table again before TLBs forgot its old place", table >> 12)
            }
            Self::TableExposed { pa, table } => {
                write!(f, "page {:#x} is a table, and {} gives access to it", table >> 12, Entry(pa))
            }
            Self::MisplacedTable { table } => {
                write!(f, "page {:#x} cannot be the table that it was made: it lies wrong", table >> 12)
            }
            Self::LinkedTwice { table } => write!(f, "page {:#x} is part of two trees", table >> 12),
            Self::WriteAfterFree { pa } => {
                write!(f, "{} was written after the table was given back", Entry(pa))
            }
            Self::WriteBeforeTlbi { pa } => {
                write!(
                    f,
                    "{} was written while walks may still come to the table by its old place",
                    Entry(pa)
                )
            }
            Self::FreedWhileLinked { table } => {
                write!(f, "page {:#x} was given back while it is part of a tree", table >> 12)
            }
            Self::FreedBeforeTlbi { table } => {
                write!(f, "page {:#x}, a table, was given back before TLBs forgot it", table >> 12)
            }
            Self::FreedTwice { table } => {
                write!(f, "page {:#x} was given back as a table twice", table >> 12)
            }
            Self::BypassedWrite { pa } => {
                write!(f, "{} was written, but not as an entry of a table", Entry(pa))
            }
            Self::GivenBeforeTaken { pa, output, held_by } => write!(
                f,
                "{} gives page {:#x} while TLBs may still hold what {held_by} had of it",
                Entry(pa),
                output >> 12
            ),
            Self::WipedBeforeTaken { page, held_by } => {
                write!(
                    f,
                    "page {:#x} was wiped while TLBs may still hold what {held_by} had of it",
                    page >> 12
                )
            }
            Self::MaintainedBeforeTaken { page, held_by } => {
                write!(f, "page {:#x} was wiped or cleaned before it was taken from {held_by}", page >> 12)
            }
        }
    }
}

/// The memory of a machine.
#[derive(Debug, Default)]
pub(crate) struct Log {
    events: VecDeque<Event>,
    pub(crate) violations: Vec<Violation>,
}

impl Log {
    /// Appends an event, dropping the oldest when the ring is full.
    pub(crate) fn event(&mut self, event: Event) {
        if self.events.len() == RING {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Returns the events, oldest first.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.iter().copied().collect()
    }

    /// Forgets the events, not the violations.
    pub(crate) fn clear(&mut self) {
        self.events.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_drops_the_oldest_event() {
        let mut log = Log::default();
        log.event(Event::DsbIshst);
        for cpu in 0..RING {
            log.event(Event::TlbiAll { cpu });
        }
        let events = log.events();
        assert_eq!(events.len(), RING);
        assert_eq!(events.first(), Some(&Event::TlbiAll { cpu: 0 }));
        log.clear();
        assert!(log.events().is_empty());
    }

    #[test]
    fn a_violation_is_told_in_pages_and_entries() {
        let twice = Violation::FreedTwice { table: 0x4000_1000 };
        assert_eq!(twice.to_string(), "page 0x40001 was given back as a table twice");
        let changed = Violation::ValidToValid { pa: 0x4000_1010, old: 0x4000_2003, new: 0 };
        assert_eq!(
            changed.to_string(),
            "entry 2 of the table in page 0x40001 was changed without a break: \
             it showed page 0x40002 (word 0x40002003), and shows nothing"
        );
        let held_by = Regime::Stage2 { vmid: 3 };
        let given = Violation::GivenBeforeTaken { pa: 0x4000_1010, output: 0x4000_5000, held_by };
        assert!(
            given.to_string().ends_with("while TLBs may still hold what the guest with VMID 3 had of it")
        );
    }
}
