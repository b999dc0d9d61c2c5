"""What the listening judge has spoken: sentences written for it, in the languages that Qwen3-TTS speaks.

The English ones hold numbers, names, questions, abbreviations, long and short ones, and sounds that are easily blurred.
A recogniser that knows the words should make no error in them, so that errors are the voice's. Other languages' have no
numbers (see judge_text).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sentence:
    """`also`: other ways to write what is to be heard."""

    text: str
    also: tuple[str, ...] = ()


CODES = {
    "english": "en",
    "german": "de",
    "french": "fr",
    "spanish": "es",
    "italian": "it",
    "portuguese": "pt",
    "russian": "ru",
    "chinese": "zh",
    "japanese": "ja",
    "korean": "ko",
}
"""As the server names a language, and as the recogniser does."""

SPACELESS = frozenset({"chinese", "japanese"})

SENTENCES: dict[str, tuple[Sentence, ...]] = {
    "english": (
        Sentence("The kettle is on, and the bread is still warm."),
        Sentence("Could you tell me where the nearest post office is?"),
        Sentence("Dr. Miller moved to Boston with her two daughters last spring."),
        Sentence("For $45 they send a parcel of up to 12 kilograms."),
        Sentence("In 1969, about 600 million people watched the landing on the moon."),
        Sentence("Stop! The bridge is closed."),
        Sentence(
            "Although the rain had not let up since the early morning, the farmers brought in the last of the hay, "
            "because they knew that by the evening the river would cover the lower fields."
        ),
        Sentence("She sells thick winter clothes, silk shirts, and sixteen kinds of leather shoes."),
        Sentence("Our flight to Madrid leaves from gate 17, doesn't it?"),
        Sentence("Mr. Brown asked Peter and Maria to wait in the kitchen."),
        Sentence("Roughly 75% of the visitors come back within a year."),
        Sentence("The judge was not convinced that the witness had told the whole truth."),
        Sentence("Thank you very much for your help yesterday."),
        Sentence("What would you do if nobody was watching?"),
        Sentence("The old clock in the hall strikes twice when the door slams."),
        Sentence("Fresh fish, brown rice, green beans and a glass of cold water, please."),
        Sentence("The new library has 3 floors, 40 desks and a small garden on the roof."),
        Sentence("He said he would never, ever do that again, and then he laughed."),
        Sentence("Scientists at the university measured how quickly the ice is melting in Greenland."),
        Sentence("Good night, and don't forget to switch off the light."),
    ),
    "german": (
        Sentence("Heute Morgen scheint die Sonne, und wir gehen zusammen in den Park."),
        Sentence("Können Sie mir bitte sagen, wo der Bahnhof ist?"),
        Sentence("Die Kinder haben am Strand eine Burg aus Sand gebaut."),
        Sentence("Mein Bruder spielt am Wochenende Gitarre in einer kleinen Band."),
        Sentence("Wir haben frisches Brot und eine Flasche Milch gekauft."),
        Sentence("Obwohl es den ganzen Tag geregnet hatte, war der Weg zum See am Abend wieder trocken."),
        Sentence("Vergiss nicht, das Fenster zu schließen, bevor du ins Bett gehst."),
        Sentence("Der alte Zug fährt langsam über die Brücke."),
    ),
    "french": (
        Sentence("Ce matin, nous allons acheter du pain et du fromage au marché."),
        Sentence("Pouvez-vous me dire où se trouve la gare ?"),
        Sentence("Les enfants jouent dans le jardin depuis ce matin."),
        Sentence("Mon frère travaille dans une petite librairie près du port."),
        Sentence("Il fait froid aujourd'hui, mais le soleil brille."),
        Sentence("N'oubliez pas de fermer la porte avant de partir."),
        Sentence("Quand la pluie a cessé, les voisins sont sortis pour nettoyer la place du village."),
        Sentence("Je voudrais un verre d'eau, s'il vous plaît."),
    ),
    "spanish": (
        Sentence("Mañana por la tarde vamos a visitar a nuestros amigos en la ciudad."),
        Sentence("¿Puede decirme dónde está la estación de tren?"),
        Sentence("Los niños juegan en la plaza después de la escuela."),
        Sentence("Mi hermana trabaja en una tienda de flores cerca del mercado."),
        Sentence("Hoy hace mucho calor, pero por la noche refresca."),
        Sentence("No olvides cerrar la ventana antes de salir de casa."),
        Sentence("Cuando dejó de llover, los vecinos salieron a limpiar las calles del pueblo."),
        Sentence("Quisiera un vaso de agua fría, por favor."),
    ),
    "italian": (
        Sentence("Domani mattina andiamo al mercato a comprare il pane e la frutta."),
        Sentence("Mi può dire dove si trova la stazione?"),
        Sentence("I bambini giocano nel giardino dietro la scuola."),
        Sentence("Mia sorella lavora in una piccola libreria vicino al porto."),
        Sentence("Oggi fa freddo, ma il cielo è sereno."),
        Sentence("Non dimenticare di chiudere la finestra prima di uscire."),
        Sentence("Quando ha smesso di piovere, i vicini sono usciti a pulire la piazza del paese."),
        Sentence("Vorrei un bicchiere d'acqua fresca, per favore."),
    ),
    "portuguese": (
        Sentence("Amanhã de manhã vamos ao mercado comprar pão e frutas."),
        Sentence("Você pode me dizer onde fica a estação de trem?"),
        Sentence("As crianças brincam no jardim atrás da escola."),
        Sentence(
            "Minha irmã trabalha em uma pequena livraria perto do porto.",
            also=("Minha irmã trabalha numa pequena livraria perto do porto.",),
        ),
        Sentence("Hoje está frio, mas o céu está limpo."),
        Sentence("Não esqueça de fechar a janela antes de sair."),
        Sentence("Quando parou de chover, os vizinhos saíram para limpar as ruas da cidade."),
        Sentence("Eu gostaria de um copo de água, por favor."),
    ),
    "russian": (
        Sentence(
            "Завтра утром мы пойдём на рынок за хлебом и фруктами.",
            also=("Завтра утром мы пойдем на рынок за хлебом и фруктами.",),
        ),
        Sentence("Скажите, пожалуйста, где находится вокзал?"),
        Sentence("Дети играют в саду за школой."),
        Sentence("Моя сестра работает в маленьком книжном магазине."),
        Sentence("Сегодня холодно, но небо ясное."),
        Sentence("Не забудь закрыть окно перед сном."),
        Sentence("Когда дождь закончился, соседи вышли на улицу."),
        Sentence("Можно мне стакан воды, пожалуйста?"),
    ),
    "chinese": (
        Sentence("明天早上我们去市场买水果。"),
        Sentence("请问火车站在哪里？"),
        Sentence("孩子们在学校后面的花园里玩。"),
        Sentence("我姐姐在一家小书店工作。"),
        Sentence("今天很冷，但是天气很好。"),
        Sentence("睡觉前别忘了关窗户。"),
        Sentence("雨停了以后，大家都到外面去了。"),
        Sentence("请给我一杯水，谢谢。"),
    ),
    "japanese": (
        Sentence("明日の朝、市場に果物を買いに行きます。"),
        Sentence("すみません、駅はどこですか。"),
        Sentence("子供たちは学校の庭で遊んでいます。"),
        Sentence("姉は小さな本屋で働いています。"),
        Sentence("今日は寒いですが、空は晴れています。"),
        Sentence("寝る前に窓を閉めてください。"),
        Sentence("雨が止んでから、みんな外に出ました。"),
        Sentence("水をください。"),
    ),
    "korean": (
        Sentence("내일 아침에 시장에 가서 과일을 살 거예요."),
        Sentence("실례합니다, 기차역이 어디에 있어요?"),
        Sentence("아이들이 학교 뒤에서 놀고 있어요."),
        Sentence("우리 누나는 작은 서점에서 일해요."),
        Sentence("오늘은 춥지만 하늘이 맑아요."),
        Sentence("자기 전에 창문을 꼭 닫으세요."),
        Sentence("비가 그친 뒤에 모두 밖으로 나갔어요."),
        Sentence("물 한 잔 주세요."),
    ),
}
