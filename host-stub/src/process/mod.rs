//! EL0 programs: loading, signals, the end.

pub mod context;
pub mod elf;
pub mod frame;
pub mod signal;
pub mod stack;
pub mod thread;
pub mod trap;

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::ops::Range;

use context::{FpState, UserContext};
use signal::{Action, Actions, Fate, SA_RESTORER, SA_SIGINFO, Signal};
use thread::Thread;

use crate::errno::Errno;
use crate::fs::Files;
use crate::gmem::Inode;
use crate::gmem::fallocate::MapsContent;
use crate::host::Host;
use crate::kvm::memory::Caller;
use crate::mm::space::Access;
use crate::mm::{AddressSpace, Backing, Holder, PAGE, Pfn, Prot};

/// First address behind a program's stack.
const STACK_TOP: u64 = 0x7fff_ffff_0000;
/// Bytes of the stack; its pages come on demand.
const STACK_SIZE: u64 = 1 << 20;
/// Where the page with the signal return is.
const TRAMPOLINE: u64 = STACK_TOP + PAGE;
/// `mov x8, #139; svc #0`: what a handler without a restorer returns to.
const TRAMPOLINE_CODE: [u32; 2] = [0xd280_1168, 0xd400_0001];
/// Most bytes of heap by `brk`.
const BREAK_LIMIT: u64 = 1 << 30;

/// A program with everything that it has.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub id: u64,
    /// The thread that is served; while none is, one of no meaning.
    pub thread: Box<Thread>,
    /// Its memory.
    pub space: AddressSpace,
    /// What it has open.
    pub files: Files,
    /// What it does about signals.
    pub actions: Actions,
    /// Its heap by `brk`: from where, and up to where now.
    pub heap: Range<u64>,
    trampoline: Pfn,
    /// Number of its threads.
    pub threads: usize,
    last_thread: u64,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exit(i32),
    /// This signal killed it.
    Killed(Signal),
}

impl Process {
    /// Loads a program.
    pub fn load(host: &mut Host, id: u64, file: &[u8], arguments: &[&[u8]]) -> Result<Self, Errno> {
        let image = elf::Image::parse(file).map_err(|error| {
            log::error!("no program: {error:?}");
            Errno::from(error)
        })?;
        let mut space = AddressSpace::new(host, id as u16)?;
        for segment in &image.segments {
            space.map(segment.range.clone(), segment.prot, Backing::Anonymous)?;
            space.load(host, segment.address, segment.bytes)?;
        }
        let stack = STACK_TOP.saturating_sub(STACK_SIZE)..STACK_TOP;
        space.map(stack.clone(), Prot::READ | Prot::WRITE, Backing::Anonymous)?;
        let content = stack::StackContent {
            arguments,
            headers: image.headers,
            header_count: image.header_count,
            entry: image.entry,
            random: host.machine.random(),
        };
        let (sp, bytes) = stack::build(STACK_TOP, &content);
        if sp < stack.start {
            return Err(Errno::ENOMEM);
        }
        space.load(host, sp, &bytes)?;
        let trampoline = host.take_zeroed(Holder::Kernel)?;
        for (index, instruction) in (0u64..).zip(TRAMPOLINE_CODE) {
            let address = trampoline.address() | (index * 4);
            host.machine.write(address, &instruction.to_le_bytes()).map_err(|_| Errno::EIO)?;
        }
        let backing = Backing::Kernel { frame: trampoline };
        space.map(TRAMPOLINE..TRAMPOLINE + PAGE, Prot::READ | Prot::EXEC, backing)?;
        Ok(Self {
            id,
            thread: Box::new(Thread::first(id, image.entry, sp)),
            space,
            files: Files::with_console(),
            actions: Actions::default(),
            heap: image.end..image.end,
            trampoline,
            threads: 1,
            last_thread: id,
        })
    }

    /// A number that no thread had before.
    pub fn new_thread_id(&mut self) -> u64 {
        self.last_thread = self.last_thread.saturating_add(1);
        self.last_thread
    }

    /// Moves the end of the heap, as `brk` does. Returns the end, moved or not.
    pub fn set_break(&mut self, host: &mut Host, end: u64) -> (u64, crate::mm::space::Unmapped) {
        let limit = self.heap.start.saturating_add(BREAK_LIMIT);
        let mut unmapped = crate::mm::space::Unmapped::default();
        let (Some(old), Some(new)) = (crate::mm::page_up(self.heap.end), crate::mm::page_up(end)) else {
            return (self.heap.end, unmapped);
        };
        if end < self.heap.start || end > limit {
            return (self.heap.end, unmapped);
        }
        if new > old {
            if self.space.map(old..new, Prot::READ | Prot::WRITE, Backing::Anonymous).is_err() {
                return (self.heap.end, unmapped);
            }
        } else if new < old {
            unmapped = self.space.unmap(host, &(new..old));
        }
        self.heap.end = end;
        (end, unmapped)
    }

    /// Lets the thread handle a signal that it caused, or says how the program ends.
    pub fn deliver(&mut self, host: &mut Host, signal: Signal) -> Result<(), Ended> {
        let before = self.thread.signals.blocked();
        let action =
            self.actions.force(&mut self.thread.signals, signal.number).ok_or(Ended::Killed(signal))?;
        self.enter_handler(host, signal, action, before)
    }

    /// Lets the thread handle the signals that were sent to it, one in the handler of the other.
    pub fn deliver_sent(&mut self, host: &mut Host) -> Result<(), Ended> {
        loop {
            let before = self.thread.signals.blocked();
            let Some((number, fate)) = self.actions.next_sent(&mut self.thread.signals) else {
                return Ok(());
            };
            let signal = Signal::sent(number, self.id);
            match fate {
                Fate::Handled(action) => self.enter_handler(host, signal, action, before)?,
                Fate::Ignored => (),
                Fate::Kills => return Err(Ended::Killed(signal)),
            }
        }
    }

    fn enter_handler(
        &mut self,
        host: &mut Host,
        signal: Signal,
        action: Action,
        mask: u64,
    ) -> Result<(), Ended> {
        let context = &mut self.thread.context;
        let mut fp = FpState::default();
        host.machine.save_fp(&mut fp);
        let bytes = frame::build(signal, &frame::Saved { context: *context, fp, mask });
        let at = frame::place(context.sp).ok_or(Ended::Killed(signal))?;
        self.space.write(host, at, &bytes).map_err(|_| Ended::Killed(Signal::no_mapping(at)))?;
        context.sp = at;
        context.pc = action.handler;
        context.x[0] = signal.number.into();
        if action.flags & SA_SIGINFO != 0 {
            context.x[1] = at;
            context.x[2] = at.saturating_add(frame::UCONTEXT);
        }
        context.x[29] = at.saturating_add(frame::SIZE as u64);
        context.x[30] = if action.flags & SA_RESTORER != 0 { action.restorer } else { TRAMPOLINE };
        Ok(())
    }

    /// Undoes [`Process::deliver`]: `rt_sigreturn`. A frame that cannot be is answered with SIGSEGV.
    pub fn return_from_signal(&mut self, host: &mut Host) -> Result<(), Signal> {
        let at = self.thread.context.sp;
        let mut bytes = alloc::vec![0u8; frame::SIZE];
        let saved = match self.space.read(host, at, &mut bytes) {
            Ok(()) if at.is_multiple_of(16) => frame::parse(&bytes),
            _ => None,
        };
        let saved = saved.ok_or(Signal::no_mapping(at))?;
        // No handler changes what is not in its frame.
        self.thread.context = UserContext { tls: self.thread.context.tls, ..saved.context };
        self.thread.signals.set_blocked(saved.mask);
        host.machine.restore_fp(&saved.fp);
        Ok(())
    }

    /// Takes the process apart: what it had open, its memory, and the frame of its trampoline, which is
    /// the kernel's to free once the memory is gone.
    pub fn into_parts(self) -> (Files, AddressSpace, Pfn) {
        (self.files, self.space, self.trampoline)
    }
}

impl MapsContent for Process {
    fn unmap_content(&mut self, host: &mut Host, inode: &Rc<Inode>, pages: &Range<u64>) {
        self.space.unmap_content(host, inode, pages);
    }
}

impl Caller for Process {
    fn frame_at(&mut self, host: &mut Host, address: u64, access: Access) -> Result<Pfn, Errno> {
        Ok(self.space.resolve(host, address, access)?)
    }

    fn is_single_threaded(&self) -> bool {
        self.threads == 1
    }
}
