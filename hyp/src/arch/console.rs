//! The console: a PL011 behind `log`. One lock; a line is written whole.
//!
//! The host uses the same UART after it has started, and sets it up as it likes: EL2 only writes bytes, each
//! after a bounded wait for room in the transmit queue.

use core::fmt::{self, Write};
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Mutex;
use tock_registers::interfaces::{ReadWriteable, Readable, Writeable};
use tock_registers::registers::{ReadOnly, ReadWrite};
use tock_registers::{register_bitfields, register_structs};

/// Address of the UART of QEMU's `virt` machine.
pub const UART_BASE: u64 = 0x0900_0000;

/// How often the transmit queue is looked at before a byte is given up: some milliseconds on hardware, and
/// more than a queue of 32 bytes takes at any speed that a console has.
const PATIENCE: u32 = 1 << 20;

register_bitfields! {u32,
    Flags [
        TXFF OFFSET(5) NUMBITS(1) []
    ],
    Control [
        UARTEN OFFSET(0) NUMBITS(1) [],
        TXE OFFSET(8) NUMBITS(1) []
    ]
}

register_structs! {
    /// PL011 (Arm DDI 0183), as far as a transmitter needs it.
    Pl011 {
        (0x00 => data: ReadWrite<u32>),
        (0x04 => _reserved0),
        (0x18 => flags: ReadOnly<u32, Flags::Register>),
        (0x1c => _reserved1),
        (0x30 => control: ReadWrite<u32, Control::Register>),
        (0x34 => @END),
    }
}

/// The UART as something that text can be written to.
struct Uart;

impl Uart {
    fn registers(&self) -> &'static Pl011 {
        let base = UART_BASE as *const Pl011;
        // SAFETY: the early and the final tables of EL2 map this page as device memory, one to one, for
        // ever; the registers are accessed through the volatile cells of `Pl011` only.
        unsafe { &*base }
    }

    fn enable(&self) {
        self.registers().control.modify(Control::UARTEN::SET + Control::TXE::SET);
    }

    /// Sends a byte, or drops it if the queue stays full: the host may have stopped the transmitter, and EL2
    /// waits for nobody without end (I8).
    fn put(&self, byte: u8) {
        let room = || !self.registers().flags.is_set(Flags::TXFF);
        if (0..PATIENCE).any(|_| room()) {
            self.registers().data.set(u32::from(byte));
        }
    }
}

impl Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}

static UART: Mutex<Uart> = Mutex::new(Uart);

struct Console;

impl Log for Console {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let prefix = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info | Level::Debug | Level::Trace => "",
        };
        // A UART write cannot fail, and there is nobody to tell.
        let _ = writeln!(UART.lock(), "[deed] {prefix}{}", record.args());
    }

    fn flush(&self) {}
}

/// Makes the UART the target of `log`. Needs the early tables.
pub fn init() {
    UART.lock().enable();
    // Fails only when called twice, and then the console works already.
    let _ = log::set_logger(&Console);
    log::set_max_level(LevelFilter::Info);
}

/// Writes one line in the panic path, even where the panicking CPU holds the lock.
#[inline(never)]
pub fn emergency_line(line: fmt::Arguments<'_>) {
    let guard = UART.try_lock();
    let _ = writeln!(Uart, "[deed] {line}");
    drop(guard);
}
