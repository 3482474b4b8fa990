//! Stage-2 leaves: what the host's and the guests' tables say of a page.
//!
//! The truth about ownership stands here and nowhere else. A valid leaf gives access and carries in its
//! software bits whether the page is lent or borrowed; an invalid leaf is an annotation: who owns the page
//! instead.
//!
//! ```text
//! valid    63  62     57 56 55 54 53 52 51   48 47            12 11 10 9  8 7    6 5     2 1 0
//!         | 0 | lent to | SW  | XN    |0 | res0 | output address |0 |AF| SH | S2AP | MemAttr | type |
//! invalid  63                   36 35              12 11          4 3    1 0
//!         | frame in owner's space | generation      | VM slot     | kind |0|
//! ```
//! (Arm ARM DDI 0487, D8.3: VMSAv8-64 stage 2 block and page descriptors; bits 58:55 are for software, and
//! hardware ignores 62:59 while VTCR_EL2.HWU59 to HWU62 are 0, as `arch/host.rs` writes them.)

use super::{Regime, TABLE_OR_PAGE, VALID, output};
use crate::addr::{Gfn, PAGE_SHIFT, PAGE_SIZE, Pages, Pfn};
use crate::machine::{Machine, Stage2Id};
use abi::VmHandle;
use abi::page::{MAX_BORROWERS, Permissions};
use core::fmt;
use core::num::NonZeroU8;

const ATTRIBUTES_SHIFT: u32 = 2;
/// Normal memory, inner and outer write-back, so that stage 1 decides (DDI 0487, D8.6, without FEAT_S2FWB).
const ATTRIBUTES_NORMAL: u64 = 0b1111 << ATTRIBUTES_SHIFT;
/// The same with FEAT_S2FWB: take the type of stage 1.
const ATTRIBUTES_FWB_STAGE1: u64 = 0b0111 << ATTRIBUTES_SHIFT;
/// With FEAT_S2FWB: force normal write-back.
const ATTRIBUTES_FWB_NORMAL: u64 = 0b0110 << ATTRIBUTES_SHIFT;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const EXECUTE_NEVER: u64 = 1 << 54;
const SHARING_SHIFT: u32 = 55;
const SHARING: u64 = 0b11 << SHARING_SHIFT;
const LENT_SHIFT: u32 = 57;
const LENT: u64 = (MAX_BORROWERS as u64) << LENT_SHIFT;

const KIND_SHIFT: u32 = 1;
const KIND: u64 = 0b111 << KIND_SHIFT;
const KIND_EMPTY: u64 = 0 << KIND_SHIFT;
const KIND_HYP: u64 = 1 << KIND_SHIFT;
const KIND_GUEST: u64 = 2 << KIND_SHIFT;
const KIND_POISONED: u64 = 3 << KIND_SHIFT;
const KIND_LOCKED: u64 = 4 << KIND_SHIFT;
const KIND_DEVICE: u64 = 5 << KIND_SHIFT;
const KIND_WITHHELD: u64 = 6 << KIND_SHIFT;
const HANDLE_SHIFT: u32 = 4;
const HANDLE: u64 = 0xffff_ffff << HANDLE_SHIFT;
const FRAME_SHIFT: u32 = 36;

/// Who owns a page that this table does not give access to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The hypervisor.
    Hyp,
    /// A guest, at this page of its space.
    Guest {
        /// The VM.
        vm: VmHandle,
        /// Its page.
        gfn: Gfn,
    },
}

/// Whether a page that one can access is lent or borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is this side's alone.
    Owned,
    /// It is the guest's, and shared with the host (guests' tables only).
    Shared,
    /// It is the host's, and lent to guests (host's table only).
    Lent(Borrowers),
    /// It is the other side's.
    Borrowed,
    /// It is the host's, and lent to the hypervisor.
    SharedWithHyp,
}

impl Sharing {
    /// The same page of the host, lent once more; `None` if it cannot be.
    pub fn lent_once_more(self) -> Option<Self> {
        match self {
            Self::Owned => Borrowers::new(1).map(Self::Lent),
            Self::Lent(borrowers) => Borrowers::new(borrowers.get().saturating_add(1)).map(Self::Lent),
            _ => None,
        }
    }

    /// The same page of the host, lent once less; `None` if it is not lent to guests.
    pub fn lent_once_less(self) -> Option<Self> {
        match self {
            Self::Lent(borrowers) => {
                Some(Borrowers::new(borrowers.get().saturating_sub(1)).map_or(Self::Owned, Self::Lent))
            }
            _ => None,
        }
    }
}

/// How many guest pages show a page of the host's, of one guest or several: 1 to [`MAX_BORROWERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Borrowers(NonZeroU8);

impl Borrowers {
    /// So many; `None` if that is none, or more than a descriptor has room for.
    pub fn new(count: u8) -> Option<Self> {
        NonZeroU8::new(count).filter(|count| count.get() <= MAX_BORROWERS).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0.get()
    }
}

/// A page that one can access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The physical page.
    pub pfn: Pfn,
    /// Whose it is.
    pub sharing: Sharing,
    /// What may be done besides reading.
    pub permissions: Permissions,
}

/// What a stage-2 table says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// Access.
    Page(Page),
    /// Another owns it (host's table only).
    Owned(Owner),
    /// It was taken by force (guests' tables only).
    Poisoned,
    /// The guest enrolled it as a device (guests' tables only).
    Device,
    /// Nobody may access it: not memory, and too dangerous a device (host's table only).
    Withheld,
    /// A break-before-make is under way, or the word makes no sense: either way no access and no transition.
    Locked,
}

impl Entry {
    /// The page, if this side owns it alone.
    pub fn owned(self) -> Option<Page> {
        match self {
            Self::Page(page) if page.sharing == Sharing::Owned => Some(page),
            _ => None,
        }
    }
}

// What the hypervisor prints, it prints by Display: a derived Debug brings in several KiB of code for its
// fields and layouts.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pfn, how) = match self {
            Self::Owned(Owner::Guest { vm, gfn }) => {
                return write!(f, "page {:#x} of guest {:#x}", gfn.as_u64(), vm.to_word());
            }
            Self::Page(Page { pfn, sharing, .. }) => (
                pfn.as_u64(),
                match sharing {
                    Sharing::Owned => "accessible, not lent",
                    Sharing::Shared => "accessible, shared with the host",
                    Sharing::Lent(_) => "accessible, lent to guests",
                    Sharing::Borrowed => "accessible, borrowed",
                    Sharing::SharedWithHyp => "accessible, lent to the hypervisor",
                },
            ),
            Self::Empty => return f.write_str("nothing"),
            Self::Owned(Owner::Hyp) => return f.write_str("the hypervisor's"),
            Self::Poisoned => return f.write_str("taken by force"),
            Self::Device => return f.write_str("a device of the guest's"),
            Self::Withheld => return f.write_str("withheld from all"),
            Self::Locked => return f.write_str("being replaced, or senseless"),
        };
        write!(f, "frame {pfn:#x}, {how}")
    }
}

/// Whose table it is; the two differ in the memory type that stage 2 imposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host's: its stage 1 decides what is a device.
    Host,
    /// A guest's: all its memory is normal write-back.
    Guest,
}

/// The stage-2 regime of the host or of one guest.
#[derive(Clone, Copy, Debug)]
pub struct Stage2 {
    vmid: u16,
    /// What every valid leaf has: the memory type, and what never changes.
    always: u64,
}

impl Stage2 {
    /// The regime of translations under this VMID. `force_write_back`: FEAT_S2FWB is in use.
    pub const fn new(vmid: u16, force_write_back: bool, side: Side) -> Self {
        let attributes = match (force_write_back, side) {
            (false, _) => ATTRIBUTES_NORMAL,
            (true, Side::Host) => ATTRIBUTES_FWB_STAGE1,
            (true, Side::Guest) => ATTRIBUTES_FWB_NORMAL,
        };
        Self { vmid, always: VALID | TABLE_OR_PAGE | attributes | READ | INNER_SHAREABLE | ACCESSED }
    }

    #[inline(always)]
    fn encode_page(&self, page: Page) -> u64 {
        let (sharing, lent): (u64, u8) = match page.sharing {
            Sharing::Owned => (0, 0),
            Sharing::Shared => (1, 0),
            Sharing::Lent(borrowers) => (1, borrowers.get()),
            Sharing::Borrowed => (2, 0),
            Sharing::SharedWithHyp => (3, 0),
        };
        page.pfn.base().as_u64()
            | self.always
            | if page.permissions.write { WRITE } else { 0 }
            | if page.permissions.execute { 0 } else { EXECUTE_NEVER }
            | sharing << SHARING_SHIFT
            | u64::from(lent) << LENT_SHIFT
    }
}

impl Regime for Stage2 {
    type Input = Gfn;
    type Entry = Entry;

    const EMPTY: Entry = Entry::Empty;
    const BREAKS: bool = true;
    const SOFTWARE: u64 = SHARING | LENT;
    const LOCKED: u64 = KIND_LOCKED;

    #[inline(always)]
    fn encode(&self, entry: Entry) -> u64 {
        match entry {
            Entry::Page(page) => self.encode_page(page),
            Entry::Owned(Owner::Guest { vm, gfn }) => {
                KIND_GUEST | vm.to_word() << HANDLE_SHIFT | gfn.as_u64() << FRAME_SHIFT
            }
            Entry::Owned(Owner::Hyp) => KIND_HYP,
            Entry::Empty => KIND_EMPTY,
            Entry::Poisoned => KIND_POISONED,
            Entry::Device => KIND_DEVICE,
            Entry::Withheld => KIND_WITHHELD,
            Entry::Locked => KIND_LOCKED,
        }
    }

    #[inline]
    fn decode(word: u64) -> Entry {
        if word & VALID == 0 {
            return decode_annotation(word);
        }
        let lent = ((word & LENT) >> LENT_SHIFT) as u8;
        let sharing = match ((word & SHARING) >> SHARING_SHIFT, Borrowers::new(lent)) {
            _ if word & TABLE_OR_PAGE == 0 => return Entry::Locked,
            (0, None) => Sharing::Owned,
            (1, None) => Sharing::Shared,
            (1, Some(borrowers)) => Sharing::Lent(borrowers),
            (2, None) => Sharing::Borrowed,
            (3, None) => Sharing::SharedWithHyp,
            _ => return Entry::Locked,
        };
        Entry::Page(Page {
            pfn: output(word),
            sharing,
            permissions: Permissions { write: word & WRITE != 0, execute: word & EXECUTE_NEVER == 0 },
        })
    }

    #[inline(always)]
    fn step(word: u64) -> u64 {
        match word & (KIND | VALID) {
            _ if word & VALID != 0 => PAGE_SIZE,
            KIND_GUEST => 1 << FRAME_SHIFT,
            _ => 0,
        }
    }

    fn invalidate<M: Machine>(&self, machine: &M, root: Pfn, pages: Pages<Gfn>) {
        machine.invalidate_stage2(Stage2Id { vmid: self.vmid, root }, pages);
    }
}

fn decode_annotation(word: u64) -> Entry {
    match word & KIND {
        KIND_EMPTY if word == 0 => Entry::Empty,
        KIND_HYP => Entry::Owned(Owner::Hyp),
        KIND_GUEST => {
            let vm = VmHandle::from_word((word & HANDLE) >> HANDLE_SHIFT);
            match (vm, Gfn::new(word >> FRAME_SHIFT)) {
                (Some(vm), Some(gfn)) => Entry::Owned(Owner::Guest { vm, gfn }),
                _ => Entry::Locked,
            }
        }
        KIND_POISONED => Entry::Poisoned,
        KIND_DEVICE => Entry::Device,
        KIND_WITHHELD => Entry::Withheld,
        _ => Entry::Locked,
    }
}

/// Width of a guest's addresses: what an annotation's 28-bit frame number can name.
pub const GUEST_IPA_BITS: u32 = PAGE_SHIFT + 28;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgtable::Level;

    const REGIME: Stage2 = Stage2::new(1, false, Side::Host);

    /// Fields of a stage-2 leaf, written out from the Arm ARM, D8.3.1.2 and D8.6: MemAttr at 2, S2AP at 6, SH at 8, AF at
    /// 10, XN at 53 and 54.
    #[test]
    fn a_leaf_says_to_hardware_what_memory_it_is() {
        let leaf = |regime: Stage2, permissions| {
            let pfn = Pfn::new(0x4_0005).unwrap();
            Level::THREE.leaf(regime.encode(Entry::Page(Page { pfn, sharing: Sharing::Owned, permissions })))
        };
        let all = Permissions::ALL;
        let constant = Permissions { write: false, execute: false };
        assert_eq!(leaf(REGIME, all), 0x4000_57ff, "write-back, as far as stage 1 does");
        assert_eq!(leaf(REGIME, constant), 1 << 54 | 0x4000_577f);
        assert_eq!(
            leaf(Stage2::new(0, true, Side::Host), all),
            0x4000_57df,
            "of stage 1's kind (FEAT_S2FWB)"
        );
        assert_eq!(
            leaf(Stage2::new(1, true, Side::Guest), all),
            0x4000_57db,
            "write-back, whatever stage 1 says"
        );
        assert_eq!(leaf(Stage2::new(1, false, Side::Guest), all), 0x4000_57ff);
    }

    #[test]
    fn every_entry_survives_its_descriptor_at_every_leaf_level() {
        let vm = VmHandle::new(255, VmHandle::GENERATIONS - 1).unwrap();
        let pfn = Pfn::new(0x12_3450_0000 >> PAGE_SHIFT & !0x3ffff).unwrap();
        let mut entries = vec![
            Entry::Empty,
            Entry::Owned(Owner::Hyp),
            Entry::Owned(Owner::Guest { vm, gfn: Gfn::new((1 << 28) - 1).unwrap() }),
            Entry::Poisoned,
            Entry::Device,
            Entry::Withheld,
            Entry::Locked,
        ];
        let lent = [1, 2, MAX_BORROWERS].map(|count| Sharing::Lent(Borrowers::new(count).unwrap()));
        let others = [Sharing::Owned, Sharing::Shared, Sharing::Borrowed, Sharing::SharedWithHyp];
        for sharing in lent.into_iter().chain(others) {
            for word in 0..4 {
                let permissions = Permissions::from_word(word).unwrap();
                entries.push(Entry::Page(Page { pfn, sharing, permissions }));
            }
        }
        for entry in entries {
            for level in [Level::ONE, Level::TWO, Level::THREE] {
                let leaf = level.leaf(REGIME.encode(entry));
                assert_eq!(Stage2::decode(level.page_word(leaf)), entry, "{leaf:#x}");
                assert!(!level.is_table(leaf), "{entry:?} looks like a table");
            }
        }
    }

    #[test]
    fn what_an_entry_says_can_be_read_by_people() {
        let vm = VmHandle::new(3, 1).unwrap();
        let owned = Entry::Owned(Owner::Guest { vm, gfn: Gfn::new(0x200).unwrap() });
        assert_eq!(owned.to_string(), format!("page 0x200 of guest {:#x}", vm.to_word()));
        let page = Page {
            pfn: Pfn::new(0x4_0000).unwrap(),
            sharing: Sharing::Borrowed,
            permissions: Permissions::ALL,
        };
        assert_eq!(Entry::Page(page).to_string(), "frame 0x40000, accessible, borrowed");
    }

    #[test]
    fn only_pages_are_valid_descriptors() {
        let vm = VmHandle::new(255, VmHandle::GENERATIONS - 1).unwrap();
        let gfn = Gfn::new((1 << 28) - 1).unwrap();
        for entry in [Entry::Empty, Entry::Owned(Owner::Guest { vm, gfn }), Entry::Withheld, Entry::Locked] {
            assert_eq!(REGIME.encode(entry) & VALID, 0);
        }
    }

    #[test]
    fn a_word_that_makes_no_sense_gives_no_access() {
        let lent_but_owned = 1 << LENT_SHIFT | 0b11;
        for word in [0b1110, 0b01, KIND_GUEST, 1 << 40, lent_but_owned] {
            assert_eq!(Stage2::decode(word), Entry::Locked, "{word:#x}");
        }
    }

    #[test]
    fn loans_are_counted_up_to_what_a_descriptor_has_room_for_and_down_again() {
        let mut sharing = Sharing::Owned;
        for count in 1..=MAX_BORROWERS {
            sharing = sharing.lent_once_more().unwrap();
            assert_eq!(sharing, Sharing::Lent(Borrowers::new(count).unwrap()));
        }
        assert_eq!(sharing.lent_once_more(), None);
        for _ in 0..MAX_BORROWERS {
            sharing = sharing.lent_once_less().unwrap();
        }
        assert_eq!((sharing, sharing.lent_once_less()), (Sharing::Owned, None));
        for other in [Sharing::Shared, Sharing::Borrowed, Sharing::SharedWithHyp] {
            assert_eq!((other.lent_once_more(), other.lent_once_less()), (None, None), "{other:?}");
        }
    }

    #[test]
    fn the_pages_of_a_block_annotation_count_on() {
        let vm = VmHandle::new(1, 1).unwrap();
        let owned = |gfn| Entry::Owned(Owner::Guest { vm, gfn: Gfn::new(gfn).unwrap() });
        assert_eq!(REGIME.advance(owned(0x200), 5), owned(0x205));
    }

    #[test]
    fn no_two_kinds_of_entries_are_told_in_the_same_words() {
        let vm = VmHandle::new(3, 1).unwrap();
        let gfn = Gfn::new(0x80123).unwrap();
        let mut entries = vec![
            Entry::Empty,
            Entry::Owned(Owner::Hyp),
            Entry::Owned(Owner::Guest { vm, gfn }),
            Entry::Poisoned,
            Entry::Device,
            Entry::Withheld,
            Entry::Locked,
        ];
        let lent = Sharing::Lent(Borrowers::new(1).unwrap());
        for sharing in [Sharing::Owned, Sharing::Shared, lent, Sharing::Borrowed, Sharing::SharedWithHyp] {
            let pfn = Pfn::new(0x456).unwrap();
            entries.push(Entry::Page(Page { pfn, sharing, permissions: Permissions::ALL }));
        }
        let texts: std::collections::BTreeSet<String> = entries.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), entries.len(), "{texts:?}");
        assert!(texts.contains(&format!("page 0x80123 of guest {:#x}", vm.to_word())), "{texts:?}");
        assert!(texts.contains("frame 0x456, accessible, lent to guests"), "{texts:?}");
    }
}
