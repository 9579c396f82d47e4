// Answers of a model's file for the words of one text, from Rust:  predict FILE WORD...
//
//   rustc -O predict.rs -L FOLDER -l pymtl_runtime -C link-args=-Wl,-rpath,FOLDER
//
// FOLDER holds libpymtl_runtime.so: `python -m pymtl_runtime flags` tells it, behind -L. As predict.c, for tasks whose answers have names.
use std::ffi::{c_char, c_int, CStr, CString};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Field {
    name: *const c_char,
    strings: *const *const c_char,
    ids: *const i64,
    numbers: *const f32,
    width: i64,
}

#[repr(C)]
struct Task {
    name: *const c_char,
    kind: c_int,
    of_tokens: i32,
    columns: i64,
    labels: i64,
    streams: i32,
}

#[repr(C)]
struct Answer {
    ids: *const i64,
    starts: *const i64,
    numbers: *const f64,
    probability: *const f64,
    probabilities: *const f32,
}

enum Model {}
enum Session {}

extern "C" {
    fn pymtl_error() -> *const c_char;
    fn pymtl_model_load(path: *const c_char, options: *const u8, model: *mut *mut Model) -> c_int;
    fn pymtl_model_free(model: *mut Model);
    fn pymtl_task_count(model: *const Model) -> i64;
    fn pymtl_get_task(model: *const Model, task: i64, info: *mut Task) -> c_int;
    fn pymtl_label(model: *const Model, task: i64, id: i64) -> *const c_char;
    fn pymtl_session_new(model: *const Model, session: *mut *mut Session) -> c_int;
    fn pymtl_session_free(session: *mut Session);
    fn pymtl_run(
        session: *mut Session,
        batch: i64,
        lengths: *const i64,
        field_count: i64,
        fields: *const Field,
        request: *const u8,
    ) -> c_int;
    fn pymtl_get_answer(session: *const Session, task: i64, answer: *mut Answer) -> c_int;
}

fn text(pointer: *const c_char) -> String {
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn require(status: c_int) {
    if status != 0 {
        eprintln!("error: {}", text(unsafe { pymtl_error() }));
        std::process::exit(1);
    }
}

fn main() {
    let arguments: Vec<CString> = std::env::args().skip(1).map(|word| CString::new(word).unwrap()).collect();
    if arguments.len() < 2 {
        eprintln!("usage: predict FILE WORD...");
        std::process::exit(2);
    }
    let words: Vec<*const c_char> = arguments[1..].iter().map(|word| word.as_ptr()).collect();
    let length = words.len() as i64;
    unsafe {
        let (mut model, mut session) = (null_mut(), null_mut());
        require(pymtl_model_load(arguments[0].as_ptr(), null(), &mut model));
        require(pymtl_session_new(model, &mut session));
        let name = CString::new("words").unwrap();
        let field = Field { name: name.as_ptr(), strings: words.as_ptr(), ids: null(), numbers: null(), width: 1 };
        require(pymtl_run(session, 1, &length, 1, &field, null()));
        for task in 0..pymtl_task_count(model) {
            let mut info: Task = std::mem::zeroed();
            let mut answer: Answer = std::mem::zeroed();
            require(pymtl_get_task(model, task, &mut info));
            require(pymtl_get_answer(session, task, &mut answer));
            let ids = std::slice::from_raw_parts(answer.ids, *answer.starts.add(1) as usize);
            let labels: Vec<String> = ids.iter().map(|id| text(pymtl_label(model, task, *id))).collect();
            println!("{}: {}", text(info.name), labels.join(" "));
        }
        pymtl_session_free(session);
        pymtl_model_free(model);
    }
}
