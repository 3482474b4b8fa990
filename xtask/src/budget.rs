//! What each operation may cost, what it costs in pKVM, and the floor: the same work in code without error paths.
//!
//! In guest instructions on a Cortex-A76 (QEMU, `-icount shift=0`), least of all runs, EL2 and the calling
//! instruction included. pKVM: Linux 7.2, gcc 12.2 -O2. `docs/performance.md` says how all of it was taken.

/// One operation, under the name that the programs print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowance {
    pub(crate) operation: &'static str,
    /// pKVM's own figure: more than this is a defect. None where pKVM has no such thing.
    pub(crate) peer: Option<u64>,
    pub(crate) budget: Option<u64>,
    pub(crate) floor: Option<&'static str>,
}

const fn row(
    operation: &'static str,
    peer: Option<u64>,
    budget: Option<u64>,
    floor: Option<&'static str>,
) -> Allowance {
    Allowance { operation, peer, budget, floor }
}

/// All of them, in the order of the report. Each must be seen.
pub(crate) const ALLOWANCES: &[Allowance] = &[
    row("host call with an unknown id", Some(85), Some(70), Some("39 to 48")),
    row("PSCI_VERSION by SMC", Some(152), Some(110), Some("53")),
    row("host share hyp, one page", Some(240), Some(180), Some("126 to 136")),
    row("host unshare hyp, one page", Some(243), Some(180), Some("132 to 142")),
    row("refused unshare", Some(198), Some(140), Some("92 to 102")),
    row("host share hyp, 448 pages", None, None, Some("5038")),
    row("host first touch of RAM it owns", Some(1132), Some(0), Some("0")),
    row("host donate guest, one page, tables present", Some(3080), Some(500), Some("307")),
    row("host donate guest, 2 MiB block, per 4 KiB", None, Some(170), Some("144")),
    row("host donate guest, 2 MiB block, per 4 KiB, FEAT_S2FWB", None, Some(4), None),
    row("reclaim from a dying VM, one page, wiped", Some(2701), Some(600), Some("365")),
    row("split of a 2 MiB block", None, Some(1200), Some("800")),
    row("host lend to a guest, one page", None, None, None),
    row("host take a lent page back", None, None, None),
    row("host take a private page by force, wiped", None, None, None),
    row("table page for a VM", None, None, None),
    row("table page for the hypervisor", None, None, None),
    row("VM, creation", None, None, None),
    row("vCPU, creation", None, None, None),
    row("VM, begin of its end", None, None, None),
    row("VM with one vCPU, end", None, None, None),
    row("guest call answered at EL2 (FEATURES)", Some(270), Some(130), Some("53")),
    row("guest MEM_SHARE", Some(2513), Some(300), Some("150")),
    row("guest MEM_UNSHARE, immediate form", Some(2492), Some(480), Some("315")),
    row("guest MEM_UNSHARE refused", Some(789), Some(200), Some("107")),
    row("guest MEM_RELINQUISH, wiped", None, None, None),
    row("guest MMIO_GUARD_MAP", None, None, None),
    row("guest MMIO_GUARD_UNMAP", None, None, None),
    row("enter and leave a vCPU", Some(2944), Some(850), Some("405 to 490")),
    row("guest call served by the host, EL2 part", None, Some(900), None),
    row("guest call served by the host, round trip", Some(3662), Some(1500), None),
    row("guest MMIO served by the VMM, EL2 part", None, Some(900), None),
    row("guest MMIO served by the VMM, round trip", Some(7865), Some(3500), None),
    row("guest first touch of a page, EL2 part", None, Some(1500), None),
    row("guest first touch of a page, through the host", Some(8590), Some(3500), None),
    row("guest MEM_SHARE of an unmapped page, EL2 part", None, Some(1900), None),
    row("guest MEM_SHARE of an unmapped page, through the host", Some(11801), Some(4000), None),
    row("guest MEM_UNSHARE that asks, EL2 part", None, Some(1500), None),
    row("guest MEM_UNSHARE that asks, page not mapped", None, Some(3500), None),
    row("guest MEM_UNSHARE that asks, page mapped by the VMM", None, Some(5000), None),
    row("guest_memfd: host mmap fault, page present", Some(3234), Some(2000), None),
    row("guest_memfd: host mmap fault, page allocated", Some(4322), Some(2800), None),
    row("guest_memfd: punch hole, per page", Some(3208), Some(1500), None),
    row("EL2 initialisation, 1 GiB", Some(6_900_000), Some(500_000), Some("312000")),
    row("EL2 initialisation, 16 GiB", Some(56_800_000), Some(500_000), Some("312000")),
    row("EL2 code, bytes", Some(100_124), Some(81_920), Some("28672")),
    row("memory kept for the hypervisor, 1 GiB, bytes", Some(12 << 20), Some(1 << 20), Some("827392")),
    row("memory kept for the hypervisor, 16 GiB, bytes", Some(102 << 20), Some(1 << 20), Some("827392")),
];
