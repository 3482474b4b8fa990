//! From the first line of Rust to the host's first instruction, on the boot CPU. See boot.S for what comes
//! before, and [`super::secondary`] for the other CPUs.

use super::early::{self, Kind, early_map};
use super::el2::El2;
use super::exceptions;
use super::features::Features;
use super::instructions as i;
use super::layout::{self, STACKS, Stack};
use super::mmu::{self, MAIR, SCTLR_EARLY, SCTLR_FINAL, SCTLR_M, SCTLR_OFF};
use super::secondary::{self, TRANSLATION, secondary_start};
use super::traps::hcr;
use super::{cache, console, fixmap, host, power, verdict};
use crate::addr::{HypVa, Pages, Pfn, PhysAddr, Vpn};
use crate::boot::blob::{Source, total_size};
use crate::boot::image::HEADER_SIZE;
use crate::boot::{self, Plan, Problem, Region};
use crate::machine::Machine;
use crate::ownership::query::AuditError;
use crate::pgtable::hyp_stage1::Rights;
use crate::psci::End;
use crate::{Hypervisor, Mapping, Setup, SetupError};
use aarch64_cpu::registers::{HCR_EL2, Readable};
use arrayvec::ArrayVec;
use core::arch::global_asm;
use core::fmt;
use core::mem::{size_of, take};
use spin::Once;

/// CurrentEL of EL2.
const CURRENT_EL_2: u64 = 2 << 2;
/// The relocation that a position-independent image is left with: base plus addend.
const R_AARCH64_RELATIVE: u64 = 1027;
/// Where an arm64 Image may be loaded.
const IMAGE_ALIGNMENT: u64 = 2 << 20;
/// Width of the host's addresses that suffices for QEMU's `virt` machine and every table that Deed builds.
const MAX_IPA_BITS: u32 = 40;
/// Most bytes of a device tree (Linux `Documentation/arch/arm64/booting.rst`).
const MAX_TREE: usize = 2 << 20;

global_asm!(
    concat!(".equ LINK_BASE, ", env!("DEED_LINK_BASE")),
    ".equ CURRENT_EL_2, {current_el_2}",
    ".equ HCR_RW, {hcr_rw}",
    ".equ SCTLR_OFF, {sctlr_off}",
    ".equ SCTLR_EARLY, {sctlr_early}",
    ".equ SCTLR_FINAL, {sctlr_final}",
    ".equ SCTLR_M, {sctlr_m}",
    ".equ MAIR, {mair}",
    ".equ R_AARCH64_RELATIVE, {relative}",
    ".equ IMAGE_ALIGNMENT, {image_alignment}",
    ".equ STACK_SPAN, {stack_span}",
    ".equ STACKS_SIZE, {stacks_size}",
    include_str!("boot.S"),
    current_el_2 = const CURRENT_EL_2,
    hcr_rw = const hcr::RW,
    sctlr_off = const SCTLR_OFF,
    sctlr_early = const SCTLR_EARLY,
    sctlr_final = const SCTLR_FINAL,
    sctlr_m = const SCTLR_M,
    mair = const MAIR,
    relative = const R_AARCH64_RELATIVE,
    image_alignment = const IMAGE_ALIGNMENT,
    stack_span = const size_of::<Stack>(),
    stacks_size = const size_of_val(&STACKS),
    stacks = sym STACKS,
    vectors = sym exceptions::host_vectors,
    early_map = sym early_map,
    build = sym boot_build,
    finish = sym boot_finish,
    translation = sym TRANSLATION,
    secondary_start = sym secondary_start,
);

static HYPERVISOR: Once<Hypervisor<El2>> = Once::new();

/// The hypervisor, if it has been built.
pub fn try_hypervisor() -> Option<&'static Hypervisor<El2>> {
    HYPERVISOR.get()
}

/// The hypervisor. It exists before the host runs.
pub fn hypervisor() -> &'static Hypervisor<El2> {
    match HYPERVISOR.get() {
        Some(hypervisor) => hypervisor,
        None => crate::broken("a call came in before the hypervisor was built"),
    }
}

/// Why the machine is turned off instead of booted.
enum Refusal {
    /// E2H cannot be cleared: this CPU's EL2 is of another kind.
    HostExtensions,
    /// x0 at entry was no address of a device tree that the early tables can show.
    NoTree(u64),
    /// What was loaded does not fit together.
    Problem(Problem),
    /// The device tree does not name the CPUs as they are.
    Cpus,
    /// The tables cannot be built.
    Setup(SetupError),
    /// The machine has more parts than a [`Setup`] holds.
    NoRoomInSetup,
    /// EL2 can reach what it must not.
    Audit(AuditError),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostExtensions => write!(f, "HCR_EL2.E2H cannot be cleared"),
            Self::NoTree(address) => write!(f, "no device tree at {address:#x}"),
            Self::Problem(problem) => problem.fmt(f),
            Self::Cpus => write!(f, "the device tree does not name this CPU, or names one twice"),
            Self::Setup(error) => write!(f, "the tables cannot be built: {error}"),
            Self::NoRoomInSetup => write!(f, "the image has too many parts"),
            Self::Audit(error) => write!(f, "EL2 can reach what it must not: {error}"),
        }
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// Called by boot.S with MMU and caches on, under the early tables, on a stack that is larger than usual.
extern "C" fn boot_build(tree: u64) -> Start {
    console::init();
    build(tree).unwrap_or_else(|refusal| refuse(&refusal))
}

/// Called by boot.S when everything is built, on this CPU's own stack.
extern "C" fn boot_finish(start: Start) -> ! {
    match take_over() {
        Ok(()) => host::enter(start.entry, start.tree),
        Err(refusal) => refuse(&refusal),
    }
}

/// Says why the machine is not booted, and turns it off.
fn refuse(refusal: &Refusal) -> ! {
    log::error!("cannot boot: {refusal}");
    power::end(End::Off)
}

/// Where the host begins.
#[repr(C)]
struct Start {
    entry: u64,
    tree: u64,
}

/// Checks what was loaded, writes the host's device tree, and builds the hypervisor with its tables.
fn build(tree: u64) -> Result<Start, Refusal> {
    const E2H: u64 = 1 << 34;
    if HCR_EL2.get() & E2H != 0 {
        return Err(Refusal::HostExtensions);
    }
    let blob = device_tree(tree).ok_or(Refusal::NoTree(tree))?;
    let tree = Region::new(tree, blob.len() as u64).ok_or(Refusal::NoTree(tree))?;
    let deed = Region::of_pages(layout::image());
    let mut plan = boot::plan(blob, tree, deed, read_header)?;
    if !secondary::set_cpus(&plan.facts.cpus) {
        return Err(Refusal::Cpus);
    }
    let features = Features::probe();
    let setup = setup(&mut plan, &features).ok_or(Refusal::NoRoomInSetup)?;
    let entry = plan.host.start();
    if let Some(nonce) = plan.nonce {
        verdict::set_nonce(nonce);
    }
    log::info!("image base={:#x} end={:#x}", deed.start(), deed.end());
    log::info!("host at {}, device tree at {tree}", plan.host);

    rewrite_tree(plan, tree)?;
    let built = Hypervisor::new(El2, &setup).map_err(Refusal::Setup)?;
    HYPERVISOR.call_once(|| built);
    Ok(Start { entry, tree: tree.start() })
}

/// Moves EL2 to its own tables, checks them, and sets this CPU up for the host.
fn take_over() -> Result<(), Refusal> {
    let hypervisor = hypervisor();
    let root = hypervisor.hyp_root();
    let (at, entry) = fixmap::root_entry(root);
    let machine = hypervisor.machine();
    machine.write_descriptor(PhysAddr::new(at).ok_or(Refusal::NoRoomInSetup)?, entry);
    machine.publish();
    // SAFETY: `setup` maps text, constants, data, stacks, pool, metadata and the UART one to one, which is all
    // that EL2 code uses besides the fixmap linked above.
    unsafe { mmu::enter_final(root) };
    secondary::publish(root);

    let private = HypVa::new(fixmap::FIXMAP_BASE).ok_or(Refusal::NoRoomInSetup)?;
    let pages = hypervisor.audit(Vpn::containing(private)).map_err(Refusal::Audit)?;
    log::info!("audit passed: EL2 reaches {pages} pages, all its own");
    let stage2 = hypervisor.host_stage2();
    let ipa_bits = hypervisor.host_ipa_bits();
    log::info!("host stage-2 root={:#x} ipa_bits={ipa_bits}", stage2.root.base().as_u64());
    host::prepare(&Features::probe(), stage2, ipa_bits);
    Ok(())
}

/// The device tree, if there is one at this address and the early tables show all of it.
fn device_tree(at: u64) -> Option<&'static [u8]> {
    if !early::is_reachable_tree(at) {
        return None;
    }
    let start = at as *const u8;
    // SAFETY: the early tables map at least 2 MiB from `at` on as memory, and nobody writes there until
    // `rewrite_tree`, when no reference is left.
    let head = unsafe { core::slice::from_raw_parts(start, 8) };
    let size = total_size(head.first_chunk()?).filter(|size| *size <= MAX_TREE)?;
    // SAFETY: as above, and the tree is at most 2 MiB long.
    Some(unsafe { core::slice::from_raw_parts(start, size) })
}

/// Reads the first bytes of the host's kernel, at an address that has been checked to be RAM.
fn read_header(at: u64) -> Option<[u8; HEADER_SIZE]> {
    early::map(at, Kind::Memory).ok()?;
    early::map(at.checked_add(HEADER_SIZE as u64)?, Kind::Memory).ok()?;
    i::dsb_ishst();
    i::isb();
    let mut bytes = [0; HEADER_SIZE];
    // SAFETY: the two calls above mapped the blocks of its first and last byte as memory; bytes need no
    // alignment; nobody writes there, and it is not on this stack.
    unsafe { core::ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), HEADER_SIZE) };
    // The host starts with its caches off: leave no line of its image behind.
    cache::clean_and_invalidate(at, HEADER_SIZE as u64);
    Some(bytes)
}

/// Replaces the device tree by the host's, and removes every trace of the old one.
///
/// Takes the plan, whose strings are in the old tree.
fn rewrite_tree(plan: Plan<'_>, tree: Region) -> Result<(), Refusal> {
    let size = tree.size() as usize;
    let pool = Region::of_pages(layout::pool());
    // SAFETY: the pool is the image's own memory, mapped read-write by the early tables, and nobody uses it
    // until tables are made of it.
    let scratch = unsafe { core::slice::from_raw_parts_mut(pool.start() as *mut u8, pool.size() as usize) };
    // SAFETY: `device_tree` has found a tree of this size here.
    let old = unsafe { core::slice::from_raw_parts(tree.start() as *const u8, size) };
    let old_end = Source::new(old).map_or(size, |source| source.used().min(size));
    let length = boot::edit::write(&plan, old, scratch).map_err(Problem::from)?;
    let new = scratch.get(..length).filter(|new| new.len() <= size).ok_or(Problem::NoRoomForTree)?;
    // SAFETY: the tree is in RAM and shares no byte with the image or the modules, which the plan has
    // checked; nothing reads the old tree any more.
    let target = unsafe { core::slice::from_raw_parts_mut(tree.start() as *mut u8, size) };
    let written = length.max(old_end);
    if let Some(target) = target.get_mut(..written) {
        let (front, behind) = target.split_at_mut(length);
        front.copy_from_slice(new);
        behind.fill(0);
    }
    cache::clean_and_invalidate(tree.start(), written as u64);
    Ok(())
}

/// What the core builds its tables from: the plan's pages, which nobody else looks at.
fn setup(plan: &mut Plan<'_>, features: &Features) -> Option<Setup> {
    let mut hyp_map = ArrayVec::new();
    let mut add = |pages: Pages<Pfn>, rights: Rights| {
        hyp_map.try_push(Mapping { va: pages.start().identity_va(), pages, rights }).ok()
    };
    add(layout::text(), Rights::ReadExecute)?;
    add(layout::rodata(), Rights::ReadOnly)?;
    add(layout::data(), Rights::ReadWrite)?;
    for stack in &STACKS {
        add(layout::stack(stack), Rights::ReadWrite)?;
    }
    add(layout::pool(), Rights::ReadWrite)?;
    add(layout::metadata(), Rights::ReadWrite)?;
    add(Pages::one(Pfn::containing(PhysAddr::new(console::UART_BASE)?)), Rights::Device)?;
    Some(Setup {
        ram: take(&mut plan.ram),
        no_map: take(&mut plan.no_map),
        hyp: layout::image(),
        withheld: take(&mut plan.withheld),
        ipa_bits: features.pa_bits().min(MAX_IPA_BITS),
        force_write_back: features.fwb,
        hyp_map,
        pool: layout::pool(),
        metadata: layout::metadata(),
    })
}
