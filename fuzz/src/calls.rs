//! Sequences of calls: a host that does as it likes and guests that do as they like, on a simulated machine whose tables
//! are always about to run out.
//!
//! The first byte says how many table pages there are. Each step is a byte that says what, and bytes that say how. The
//! host's calls are those of `abi::host::CALLS`, each argument chosen by what it is called there, so a new call is
//! fuzzed as soon as it is listed; but not TEST_FAIL, which breaks the hypervisor on purpose. After a step that changed a
//! table:
//!
//! - no TLB grants more than the tables do, and no descriptor was changed against the rules (I6);
//! - no page is reached by two guests, nor a private one by the host (I2), nor a table by anybody (I3);
//! - a page that comes to the host from a guest's private memory holds nothing of it (I4);
//! - EL2 has not used memory that the host or a guest reaches (I8, see [`crate::machine`]);
//!
//! and at the end every page has one owner (I1). An exit shows nothing of a protected guest but what the exit is
//! about (I10).

mod check;
mod guest;

use crate::Outcomes;
use crate::input::Input;
use crate::machine::FuzzMachine;
use abi::exit::{Access, Exit};
use abi::host::{CALLS, HostCall, HostResult};
use abi::page::Pool;
use abi::smccc::FunctionId;
use abi::tables::refusals;
use abi::{Error, VmFlags, VmHandle};
use guest::{trap_class, turn};
use hyp::addr::{Gfn, Pages, Pfn};
use hyp::ownership::query::AbortAnswer;
use hyp::{Hypervisor, Setup};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;
use std::sync::OnceLock;

// Who owns what at boot are whole blocks of 1 GiB, so that a world is made in few writes; memory that is never written
// takes none on the build machine.
const RAM: u64 = 0x4_0000;
const RAM_PAGES: u64 = GIB;
const IMAGE: u64 = 0x8_0000;
const IMAGE_PAGES: u64 = 2 * GIB;
const NO_MAP: u64 = 0x10_0000;
const WITHHELD: u64 = 0x14_0000;
const DEVICE: u64 = 0x9000;
const GIB: u64 = 0x4_0000;
/// Width of the host's addresses.
const HOST_BITS: u32 = 33;
/// Pages that are given for roots and tables end here, relative to RAM.
const SPARE_END: u64 = 0x2000;
/// Table pages of the worlds beyond those that boot takes: from none to enough.
const POOLS: [u64; 4] = [0, 2, 5, 0x20];
/// Steps of one input at the most.
const STEPS: usize = 40;
/// The first pages of RAM that are given for roots and tables.
const SPARE: u64 = 0xc00;
/// What guests write into their private pages and hold in registers that are nobody's business.
const SECRET: u64 = 0x5ec2_e75e_c2e7_0000;

const PFNS: [u64; 20] = [
    RAM,
    RAM + 1,
    RAM + 2,
    RAM + 3,
    RAM + 0x1fe,
    RAM + 0x1ff,
    RAM + 0x200,
    RAM + 0x400,
    RAM + 0x401,
    RAM + 0x5ff,
    RAM + RAM_PAGES - 1,
    RAM + RAM_PAGES,
    IMAGE,
    IMAGE + GIB,
    NO_MAP,
    DEVICE,
    WITHHELD,
    0,
    1 << 36,
    (1 << 36) - 1,
];
const GFNS: [u64; 10] = [0, 1, 2, 0x1ff, 0x200, 0x400, 0x8_0000, (1 << 28) - 1, 1 << 28, u64::MAX];
const COUNTS: [u64; 10] = [1, 1, 1, 2, 3, 0x200, 0x201, 0, 1 << 52, u64::MAX];
const SMALL: [u64; 8] = [0, 1, 2, 3, 4, 7, 8, 9];

/// Plays one input.
///
/// # Panics
/// If a promise is broken.
pub fn run(data: &[u8], outcomes: &mut Outcomes) {
    let mut input = Input::new(data);
    let pool = POOLS[usize::from(input.byte()) % POOLS.len()];
    let mut play = Play::new(least_pool() + pool);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        play.step(&mut input, outcomes);
    }
    play.end();
}

/// A VM, as the play knows it.
#[derive(Clone, Copy)]
struct Known {
    handle: VmHandle,
    flags: VmFlags,
    root: u64,
}

struct Play {
    hyp: Hypervisor<FuzzMachine>,
    host: sim::Stage2,
    vms: Vec<Known>,
    /// Every handle that ever was, and one that never was.
    handles: Vec<u64>,
    spare: u64,
    /// What the last call lacked, and for which VM.
    lack: Option<(Pool, u64, Option<VmHandle>)>,
    total: u64,
    /// Descriptors written when all was checked last.
    checked: u64,
    /// Pages that guests reached then.
    reached: BTreeMap<u64, u8>,
    /// Pages into which a guest wrote a secret while they were its own alone.
    secrets: BTreeSet<u64>,
}

fn pages(start: u64, count: u64) -> Pages<Pfn> {
    Pages::from_raw(start, count).expect("a run of pages")
}

fn setup(pool: u64) -> Setup {
    let data = IMAGE + GIB;
    Setup {
        ram: [pages(RAM, RAM_PAGES + IMAGE_PAGES + GIB)].into_iter().collect(),
        no_map: [pages(NO_MAP, GIB)].into_iter().collect(),
        hyp: pages(IMAGE, IMAGE_PAGES),
        withheld: [pages(WITHHELD, GIB)].into_iter().collect(),
        ipa_bits: HOST_BITS,
        force_write_back: false,
        // EL2's own map begins empty and gets what the host shares and donates.
        hyp_map: Default::default(),
        pool: pages(data, pool),
        metadata: pages(data + 0x100, 0x10),
    }
}

fn machine() -> FuzzMachine {
    FuzzMachine::new(pages(RAM, RAM_PAGES + IMAGE_PAGES + GIB))
}

/// The fewest table pages with which a world can be made.
fn least_pool() -> u64 {
    static LEAST: OnceLock<u64> = OnceLock::new();
    let is_enough = |pool: &u64| Hypervisor::new(machine(), &setup(*pool)).is_ok();
    *LEAST.get_or_init(|| (1..0x40).find(is_enough).expect("a pool that is large enough"))
}

impl Play {
    fn new(pool: u64) -> Self {
        let hyp = Hypervisor::new(machine(), &setup(pool)).expect("a world");
        let id = hyp.host_stage2();
        let host = sim::Stage2 { vmid: id.vmid, root: id.root.base().as_u64(), ipa_bits: HOST_BITS };
        Self {
            total: RAM_PAGES + IMAGE_PAGES,
            checked: hyp.machine().writes(),
            hyp,
            host,
            vms: Vec::new(),
            handles: vec![1 << 32 | 1],
            spare: SPARE,
            lack: None,
            reached: BTreeMap::new(),
            secrets: BTreeSet::new(),
        }
    }

    fn sim(&self) -> &sim::Sim {
        self.hyp.machine().sim()
    }

    /// A guest's translation, until its teardown retires it.
    fn guest(&self, vm: Known) -> Option<sim::Stage2> {
        self.hyp.machine().tree(vm.root)
    }

    fn step(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        outcomes.step();
        match input.byte() % 16 {
            0..=3 => self.any_call(input, outcomes),
            4 => self.new_vm(input, outcomes),
            5..=9 => self.run_guest(input, outcomes),
            10 => self.give(outcomes),
            11 => self.host_access(input, outcomes),
            12 => self.guest_store(input, outcomes),
            13 => self.fill_tlbs(),
            14 => self.host_abort(input, outcomes),
            _ => self.tear_down(input, outcomes),
        }
        self.check();
    }

    /// The registers of a call, which may be none.
    fn words(&mut self, words: [u64; 7], outcomes: &mut Outcomes) -> Option<HostResult> {
        if matches!(HostCall::decode(&words), Ok(HostCall::TestFail { .. })) {
            return None;
        }
        let Some(result) = self.hyp.host_call(0, &words).result() else {
            outcomes.note("no call");
            return None;
        };
        outcomes.note((words[0] as u32, result.outcome, result.values[0].min(3)));
        if let Err(error) = result.outcome {
            let number = FunctionId::from_x0(words[0]).number();
            let call = CALLS.iter().find(|call| call.number == number).expect("what is refused is a call");
            let listed = refusals(call.name).expect("a row of refusals");
            assert!(listed.contains(&error), "{} answers {error:?}, which is not documented", call.name);
        }
        if result.outcome == Err(Error::NoMemory) {
            let [pages, pool, ..] = result.values;
            let pool = Pool::from_word(pool).expect("a pool");
            outcomes.note((words[0] as u32, pool as u64));
            assert!(pages.is_power_of_two(), "a lack of {pages} pages");
            self.lack = Some((pool, pages, VmHandle::from_word(words[1])));
        }
        if let (Ok(HostCall::VmCreate { flags, root }), Ok(())) = (HostCall::decode(&words), result.outcome) {
            let handle = VmHandle::from_word(result.values[0]).expect("a handle");
            assert!(!self.handles.contains(&handle.to_word()), "a handle comes again");
            self.handles.push(handle.to_word());
            self.vms.push(Known { handle, flags, root: root << 12 });
        }
        if let (Ok(HostCall::VmTeardownFinish { vm }), Ok(()), 0) =
            (HostCall::decode(&words), result.outcome, result.values[1])
        {
            self.vms.retain(|known| known.handle != vm);
        }
        Some(result)
    }

    fn call(&mut self, call: HostCall, outcomes: &mut Outcomes) -> Option<HostResult> {
        self.words(call.encode(), outcomes)
    }

    /// A listed call with arguments that fit their names, or registers that are anything.
    fn any_call(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        let choice = usize::from(input.byte());
        let Some(info) = CALLS.get(choice % (CALLS.len() + 1)) else {
            let words = input.words();
            self.words(words, outcomes);
            return;
        };
        let mut words = [0; 7];
        words[0] = info.number.into();
        for (word, name) in words[1..].iter_mut().zip(info.arguments) {
            *word = match *name {
                "vm" => input.pick(&self.handles),
                "pfn" => input.pick(&PFNS),
                "root" => {
                    input.pick(&[self.spare.next_multiple_of(2) + RAM, RAM, RAM + 1, RAM + 0x400, IMAGE])
                }
                "gfn" => input.pick(&GFNS),
                "pages" => input.pick(&COUNTS),
                _ => input.pick(&SMALL),
            };
        }
        // A vCPU that is run by such a call has nothing to say.
        self.hyp.machine().play([]);
        self.words(words, outcomes);
    }

    /// A VM with a vCPU or two, and perhaps too few table pages.
    fn new_vm(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        let choice = input.byte();
        let flags = VmFlags {
            protected: choice & 3 != 0,
            unshare_immediate: choice & 4 != 0,
            mmio_unguarded: choice & 8 != 0,
        };
        let tables = u64::from(choice >> 4 & 7);
        let root = self.spare.next_multiple_of(2);
        if self.vms.len() >= 3 || root + 0x20 >= SPARE_END {
            return;
        }
        self.spare = root + 2 + tables;
        let made = self.call(HostCall::VmCreate { flags, root: RAM + root }, outcomes);
        let Some(HostResult { outcome: Ok(()), values: [word, ..] }) = made else { return };
        let vm = VmHandle::from_word(word).expect("a handle");
        if tables > 0 {
            self.call(HostCall::VmTopUp { vm, pfn: RAM + root + 2, pages: tables }, outcomes);
        }
        for vcpu in 0..1 + u64::from(choice >> 7) {
            self.call(HostCall::VcpuCreate { vm, vcpu }, outcomes);
        }
        self.call(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x1000, x0: 0 }, outcomes);
    }

    /// Runs a vCPU in which the guest does something, and looks at the exit.
    fn run_guest(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        if self.vms.is_empty() {
            return;
        }
        let vm = self.vms[usize::from(input.byte()) % self.vms.len()];
        let vcpu = u64::from(input.byte() & 1);
        let turn = turn(input);
        let trap = turn.trap;
        self.hyp.machine().play([turn]);
        let run = HostCall::VcpuRun { vm: vm.handle, vcpu, values: [SECRET - 1; 4] };
        let Some(HostResult { outcome: Ok(()), values }) = self.call(run, outcomes) else { return };
        let exit = Exit::from_words(values).expect("an exit");
        outcomes.note((vm.flags.protected, discriminant(&exit), trap_class(trap)));
        match exit {
            Exit::NeedPages { pool, pages } => self.lack = Some((pool, pages, Some(vm.handle))),
            Exit::MissingPage { ipa, .. } | Exit::Unshare { ipa, .. } => assert_eq!(ipa & 0xfff, 0),
            Exit::Mmio { ipa, size, write, .. } => self.check_mmio(vm, ipa, size, write, outcomes),
            _ => {}
        }
        if vm.flags.protected && !matches!(exit, Exit::Mmio { write: true, .. }) {
            let shown = values.iter().find(|value| **value & !0xffff == SECRET);
            assert_eq!(shown, None, "an exit shows a register: {exit:x?}");
        }
    }

    /// Gives what was lacking.
    fn give(&mut self, outcomes: &mut Outcomes) {
        let Some((pool, count, vm)) = self.lack.take() else { return };
        let first = self.spare.next_multiple_of(count.min(0x200));
        if first + count >= SPARE_END {
            return;
        }
        self.spare = first + count;
        let (pfn, pages) = (RAM + first, count);
        match (pool, vm) {
            (Pool::Vm, Some(vm)) => self.call(HostCall::VmTopUp { vm, pfn, pages }, outcomes),
            (Pool::Vm, None) => None,
            (pool, _) => self.call(HostCall::PoolTopUp { pool, pfn, pages }, outcomes),
        };
    }

    /// The host loads or stores, on either CPU.
    fn host_access(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        let how = input.byte();
        let ipa = (input.pick(&PFNS) << 12) & ((1 << HOST_BITS) - 1);
        let cpu = usize::from(how & 1);
        let done = match how & 2 {
            0 => self.sim().guest_or_host_read(cpu, self.host, ipa).is_ok(),
            _ => self.sim().guest_or_host_write(cpu, self.host, ipa, u64::MAX).is_ok(),
        };
        outcomes.note(("host", how & 2, done));
    }

    /// A guest stores, wherever its tables lead. In a page that is its own alone it keeps a secret.
    fn guest_store(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        if self.vms.is_empty() {
            return;
        }
        let vm = self.vms[usize::from(input.byte()) % self.vms.len()];
        let ipa = (input.pick(&GFNS) & ((1 << 28) - 1)) << 12;
        let Some(stage2) = self.guest(vm) else { return };
        let Ok(leaf) = self.sim().walk_stage2(stage2, ipa) else { return };
        let private = vm.flags.protected && leaf.sw & 3 == 0;
        let value = if private { SECRET } else { 1 };
        let stored = self.sim().guest_or_host_write(1, stage2, ipa, value).is_ok();
        outcomes.note(("guest", private, stored));
        if stored && private {
            self.secrets.insert((leaf.pa + (ipa - leaf.ipa)) >> 12);
        }
    }

    fn fill_tlbs(&self) {
        for cpu in 0..2 {
            self.sim().speculate(cpu, self.host);
            for guest in self.vms.iter().filter_map(|vm| self.guest(*vm)) {
                self.sim().speculate(cpu, guest);
            }
        }
    }

    /// An abort of the host at any page: to be tried again exactly if the host may have it.
    fn host_abort(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        let page = input.pick(&PFNS) & ((1 << HOST_BITS >> 12) - 1);
        let access = [Access::Read, Access::Write, Access::Execute][usize::from(input.byte() % 3)];
        let answer = self.hyp.host_abort(Gfn::new(page).expect("a page"), access);
        outcomes.note((answer == AbortAnswer::Retry, access as u64));
        let wanted = match access {
            Access::Read => sim::Access::Read,
            Access::Write => sim::Access::Write,
            Access::Execute => sim::Access::Execute,
        };
        let leaf = self.sim().walk_stage2(self.host, page << 12);
        let may = leaf.is_ok_and(|leaf| leaf.permits(wanted));
        assert_eq!(answer == AbortAnswer::Retry, may, "page {page:#x}");
    }

    /// Ends a VM as far as it goes: takes its pages back, one call for each run that its tables show.
    fn tear_down(&mut self, input: &mut Input<'_>, outcomes: &mut Outcomes) {
        if self.vms.is_empty() {
            return;
        }
        let known = self.vms[usize::from(input.byte()) % self.vms.len()];
        let Known { handle: vm, flags, .. } = known;
        self.call(HostCall::VmTeardownStart { vm }, outcomes);
        let leaves = self.guest(known).map(|stage2| self.sim().leaves_stage2(stage2));
        for leaf in leaves.into_iter().flatten().take(8) {
            let (gfn, pages) = (leaf.ipa >> 12, leaf.size >> 12);
            let back = match flags.protected {
                true => HostCall::ReclaimGuest { vm, gfn, pages },
                false => HostCall::UnshareGuest { vm, gfn, pages },
            };
            self.call(back, outcomes);
        }
        for _ in 0..4 {
            let result = self.call(HostCall::VmTeardownFinish { vm }, outcomes);
            match result {
                Some(HostResult { outcome: Ok(()), values: [_, left, ..] }) if left > 0 => {}
                _ => break,
            }
        }
    }
}
