//! Every allocation of every call fails once, in many states with whole blocks, split ones and ends of blocks: the
//! answer names the pool, nothing has changed, and the same call without a failure does what the specification says.
//!
//! The last is the oracle's business, which runs beside every transition here.

use abi::exit::Exit;
use abi::host::{HostCall, HostResult};
use abi::page::{Permissions, Pool};
use abi::{Error, VmFlags, VmHandle, guest};
use deed_tests::tell::{host_call, info_of};
use deed_tests::tell_reached;
use hyp::testing::{PROTECTED, RAM_START, World};
use spec::worlds::LISTED;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A VM that is not protected.
const OPEN: VmFlags = VmFlags { protected: false, ..PROTECTED };

/// A protected VM whose unshare asks the host.
const ASKS: VmFlags = VmFlags { unshare_immediate: false, ..PROTECTED };

/// A world with a protected VM, an open one, and one that has asked for a page of a block that it shares; each with a
/// vCPU.
struct Start {
    world: World,
    protected: VmHandle,
    open: VmHandle,
    asks: VmHandle,
}

/// Something that somebody does.
#[derive(Clone, Copy, Debug)]
enum Op {
    Host(HostCall),
    /// A call of the protected guest: function, guest page, pages.
    Guest(u32, u64, u64),
}

impl Op {
    /// Its name in the documents.
    fn name(self) -> &'static str {
        match self {
            Self::Host(call) => info_of(call).name,
            Self::Guest(function, ..) => {
                GUEST_CALLS.iter().find(|(number, _)| *number == function).expect("a call of guests").1
            }
        }
    }

    fn tell(self) -> String {
        match self {
            Self::Host(call) => host_call(call),
            Self::Guest(_, page, pages) => {
                format!("{} of {pages} guest pages from {page:#x} on", self.name())
            }
        }
    }
}

/// The calls of guests that change a table.
const GUEST_CALLS: [(u32, &str); 5] = [
    (guest::MEM_SHARE, "MEM_SHARE"),
    (guest::MEM_UNSHARE, "MEM_UNSHARE"),
    (guest::MEM_RELINQUISH, "MEM_RELINQUISH"),
    (guest::MMIO_GUARD_MAP, "MMIO_GUARD_MAP"),
    (guest::MMIO_GUARD_UNMAP, "MMIO_GUARD_UNMAP"),
];

/// What comes of it.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Done,
    Refused,
    Lacks(Option<Pool>),
}

impl Start {
    fn new() -> Self {
        let world = World::new();
        let protected = world.vm(PROTECTED, 0x1000, 16);
        let open = world.vm(OPEN, 0x1020, 16);
        let asks = world.vm(ASKS, 0x1040, 16);
        for vm in [protected, open, asks] {
            world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
            world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x1000, x0: 0 });
        }
        world.ok(HostCall::DonateGuest { vm: asks, pfn: RAM_START + 0x1200, gfn: 0x200, pages: 0x200 });
        let (_, shared) = world.guest_call(asks, 0, [guest::MEM_SHARE.into(), 0x200 << 12, 0x200, 0]);
        assert_eq!(shared, Some([0, 0x200, 0, 0]));
        let (asked, _) = world.guest_call(asks, 0, [guest::MEM_UNSHARE.into(), 0x201 << 12, 1, 0]);
        assert_eq!(Exit::from_words(asked.values), Some(Exit::Unshare { ipa: 0x201 << 12, pages: 1 }));
        Self { world, protected, open, asks }
    }

    /// Everything that is tried, also to come to other states. Blocks are pages 0x400, 0x600, 0xa00 and 0xc00 of RAM;
    /// the guests' begin at page 0x200.
    fn ops(&self) -> Vec<Op> {
        let (vm, open, ram) = (self.protected, self.open, |page: u64| RAM_START + page);
        let permissions = Permissions::ALL;
        let host = [
            HostCall::PoolTopUp { pool: Pool::Tables, pfn: ram(0xa00), pages: 8 },
            HostCall::PoolTopUp { pool: Pool::Metadata, pfn: ram(0xa08), pages: 1 },
            HostCall::VmTopUp { vm, pfn: ram(0xa10), pages: 4 },
            HostCall::VmTopUp { vm, pfn: ram(0xa00), pages: 0x200 },
            HostCall::ShareHyp { pfn: ram(0x400), pages: 1 },
            HostCall::ShareHyp { pfn: ram(0x400), pages: 0x200 },
            HostCall::UnshareHyp { pfn: ram(0x400), pages: 1 },
            HostCall::UnshareHyp { pfn: ram(0x5ff), pages: 1 },
            HostCall::TestPin { pfn: ram(0x400) },
            HostCall::TestUnpin { pfn: ram(0x400) },
            HostCall::DonateGuest { vm, pfn: ram(0x600), gfn: 0x200, pages: 0x200 },
            HostCall::DonateGuest { vm, pfn: ram(0x600), gfn: 0x200, pages: 1 },
            HostCall::DonateGuest { vm, pfn: ram(0x601), gfn: 0x3ff, pages: 2 },
            HostCall::ShareGuest { vm: open, pfn: ram(0xc00), gfn: 0x200, pages: 0x200, permissions },
            HostCall::ShareGuest { vm: open, pfn: ram(0xc01), gfn: 0x201, pages: 1, permissions },
            HostCall::ShareGuest { vm: open, pfn: ram(0xc01), gfn: 0x600, pages: 1, permissions },
            HostCall::UnshareGuest { vm: open, gfn: 0x201, pages: 1 },
            HostCall::UnshareGuest { vm: open, gfn: 0x200, pages: 0x200 },
            HostCall::ReclaimGuest { vm, gfn: 0x200, pages: 1 },
            HostCall::ReclaimGuest { vm, gfn: 0x200, pages: 0x200 },
            HostCall::ForceReclaim { pfn: ram(0x601), pages: 1 },
            HostCall::VmCreate { flags: PROTECTED, root: ram(0xe00) },
            HostCall::VcpuCreate { vm, vcpu: 1 },
            HostCall::VmTeardownStart { vm },
            HostCall::VmTeardownFinish { vm },
            HostCall::UnshareAck { vm: self.asks, vcpu: 0 },
        ];
        let guest = [guest::MEM_SHARE, guest::MEM_UNSHARE, guest::MEM_RELINQUISH];
        let guest = guest.into_iter().flat_map(|function| {
            [(0x200, 1), (0x3ff, 1), (0x200, 0x200)].map(|(page, pages)| Op::Guest(function, page, pages))
        });
        let guard = [
            Op::Guest(guest::MMIO_GUARD_MAP, 0x800, 1),
            Op::Guest(guest::MMIO_GUARD_MAP, 0x800, 0x200),
            Op::Guest(guest::MMIO_GUARD_UNMAP, 0x800, 1),
        ];
        host.into_iter().map(Op::Host).chain(guest).chain(guard).collect()
    }

    fn make(&self, op: Op) -> Came {
        match op {
            Op::Host(call) => match self.world.call(call) {
                HostResult { outcome: Ok(()), .. } => Came::Done,
                HostResult { outcome: Err(Error::NoMemory), values } => {
                    Came::Lacks(Pool::from_word(values[1]))
                }
                _ => Came::Refused,
            },
            Op::Guest(function, page, pages) => {
                let call = [u64::from(function), page << 12, pages, 0];
                let (result, answer) = self.world.guest_call(self.protected, 0, call);
                match result.outcome.is_ok().then(|| Exit::from_words(result.values)).flatten() {
                    Some(Exit::NeedPages { pool, .. }) => Came::Lacks(Some(pool)),
                    _ if answer.is_some_and(|[x0, ..]| x0 == 0) => Came::Done,
                    _ => Came::Refused,
                }
            }
        }
    }

    /// The world after these, if all of them can be done one after the other.
    fn after(ops: &[usize]) -> Option<Self> {
        let start = Self::new();
        let all = start.ops();
        let done = ops.iter().all(|op| start.make(all[*op]) == Came::Done);
        done.then_some(start)
    }
}

/// What was tried: how often an allocation failed, by call and pool.
#[derive(Default)]
struct Tried {
    states: u64,
    pairs: u64,
    failures: BTreeMap<(&'static str, &'static str), u64>,
}

/// Fails every allocation of every call in one state.
fn try_all_in(ops: &[usize], tried: &mut Tried) {
    let Some(mut start) = Start::after(ops) else { return };
    tried.states += 1;
    let before = start.world.snapshot();
    for op in start.ops() {
        tried.pairs += 1;
        start.world.load_all();
        let mut moved = false;
        for k in 1.. {
            let story = || {
                let all = start.ops();
                let story: Vec<String> = ops.iter().map(|op| all[*op].tell()).collect();
                format!("after\n    {}\n{}, of which allocation {k} fails", story.join("\n    "), op.tell())
            };
            let changes = start.world.sim().changes();
            start.world.fail_allocation(k);
            let came = start.make(op);
            let failed = start.world.stop_failing();
            start.world.check();
            let Some(pool) = failed else {
                // The call as it is. What it did is compared by the oracle.
                assert!(!matches!(came, Came::Lacks(_)), "{}: nothing failed, and it lacks pages", story());
                moved = came == Came::Done || start.world.sim().changes() != changes;
                assert!(k == 1 || came == Came::Done, "{}: then it is refused", story());
                break;
            };
            let what = (op.name(), ["tables", "metadata", "VM"][pool as usize]);
            *tried.failures.entry(what).or_default() += 1;
            assert_eq!(came, Came::Lacks(Some(pool)), "{}", story());
            assert_eq!(start.world.pools(), before.pools, "{}", story());
            assert_eq!(start.world.census(), before.census, "{}", story());
            // Where no word of RAM was written, no page is another.
            if start.world.sim().changes() != changes {
                assert_eq!(before.difference(&start.world.snapshot()), None, "{}", story());
            }
        }
        if moved {
            start = Start::after(ops).expect("it was done before");
        }
    }
}

#[test]
fn an_allocation_that_fails_leaves_everything_as_it_was() {
    let ops = Start::new().ops().len();
    let states: Vec<Vec<usize>> = std::iter::once(Vec::new())
        .chain((0..ops).map(|first| vec![first]))
        .chain((0..ops).flat_map(|first| (0..ops).map(move |second| vec![first, second])))
        .collect();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut tried = Tried::default();
    std::thread::scope(|scope| {
        let play = || {
            let mut tried = Tried::default();
            while let Some(state) = states.get(next.fetch_add(1, Ordering::Relaxed)) {
                try_all_in(state, &mut tried);
            }
            tried
        };
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(play)).collect();
        for thread in running {
            let part = match thread.join() {
                Ok(part) => part,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            tried.states += part.states;
            tried.pairs += part.pairs;
            part.failures
                .into_iter()
                .for_each(|(what, count)| *tried.failures.entry(what).or_default() += count);
        }
    });
    let triples: u64 = tried.failures.values().sum();
    tell_reached(format_args!(
        "{} states, {} pairs of a state and a call, {triples} triples with an allocation that failed, of {} calls and \
         pools",
        tried.states,
        tried.pairs,
        tried.failures.len()
    ));
    // By the specification these, and by the documents also a record of a vCPU, which it does not know.
    let lacks = LISTED.iter().zip(spec::call::CALLS).flat_map(|(outcomes, call)| {
        let call = if call == "pin" { "TEST_PIN" } else { call };
        outcomes.iter().filter_map(move |outcome| Some((call, outcome.strip_prefix("NoMemory: ")?)))
    });
    let expected: BTreeSet<_> = lacks.chain([("VCPU_CREATE", "metadata")]).collect();
    let failed: BTreeSet<_> = tried.failures.into_keys().collect();
    let never: Vec<_> = expected.difference(&failed).collect();
    assert!(never.is_empty(), "no allocation of these failed: {never:?}");
    let unknown: Vec<_> = failed.difference(&expected).collect();
    assert!(unknown.is_empty(), "these lack nothing by the specification: {unknown:?}");
}
